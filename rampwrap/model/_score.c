/* The default model's choice in one call: histogram, features, prediction, guard. Optional; see native.py.
 *
 * The arithmetic is that of rampwrap.cost.Local in the same order, so both give the same bits: additions,
 * products, IEEE divisions and roundings to whole numbers, nothing else. Compile without -ffast-math and with
 * -ffp-contract=off. Whatever is unusual is answered by None, and numpy serves.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0 || defined(__FAST_MATH__)
#error "doubles are not evaluated as numpy does; it serves instead"
#endif

enum { LAYOUT = 1, HEADER = 8 };                                       /* native.LAYOUT and words before the tables */
enum { MAX_EXPERTS = 2048, MAX_CONFIGS = 1024, MAX_SUPPORT = 256, MAX_HEIGHTS = 64 }; /* all scratch is on the stack */
static const int64_t MAX_SLOTS = (int64_t)1 << 40;                     /* products of it with CTAs stay below 2**62 */

/* What native.pack wrote: 8-byte words, arrays in this order. */
typedef struct {
    int64_t configs, cuts, support, heights, launches, locals;
    const int64_t *height;                  /* [heights] block_m */
    const int64_t *cut_height;              /* [cuts] place in height */
    const double *cut_slots, *cut_ctas;     /* [cuts] */
    const double *cut_launch;               /* [cuts][launches] */
    const double *low, *high;               /* [cuts][5] */
    const double *shared;                   /* [2][support] scaled slots and active experts of the support points */
    const double *own;                      /* [cuts][3][support] their blocks, waves and unused waves */
    const int64_t *first;                   /* [cuts + 1] where a cut's configs begin in the next four */
    const int64_t *place;                   /* [configs] number of the config */
    const int64_t *fitted;                  /* [configs] */
    const double *coef;                     /* [configs][5] */
    const double *weights;                  /* [configs][support] */
    const int64_t *span;                    /* [configs][2] by number of the config */
    const int64_t *local_slots;             /* [locals] ascending */
    const double *margin;                   /* [locals] */
} Model;

/* Sizes, places and numbers are checked, so no bytes whatever can make the code below leave its arrays. */
static int unpack(PyObject *packed, Model *m)
{
    char *bytes;
    Py_ssize_t length;
    if (!PyBytes_Check(packed) || PyBytes_AsStringAndSize(packed, &bytes, &length) < 0) {
        PyErr_Clear();
        return 0;
    }
    if (length < HEADER * 8 || (uintptr_t)bytes % 8) return 0;
    const int64_t *head = (const int64_t *)bytes;
    if (head[0] != LAYOUT) return 0;
    m->configs = head[1], m->cuts = head[2], m->support = head[3];
    m->heights = head[4], m->launches = head[5], m->locals = head[6];
    if (m->configs < 1 || m->configs > MAX_CONFIGS || m->cuts < 1 || m->cuts > m->configs || m->support < 1 ||
        m->support > MAX_SUPPORT || m->heights < 1 || m->heights > MAX_HEIGHTS || m->launches < 1 ||
        m->launches > 64 || m->locals < 1 || m->locals > 1 << 20)
        return 0;
    const int64_t *at = head + HEADER;
#define TAKE(field, type, count) (m->field = (const type *)at, at += (count))
    TAKE(height, int64_t, m->heights);
    TAKE(cut_height, int64_t, m->cuts);
    TAKE(cut_slots, double, m->cuts);
    TAKE(cut_ctas, double, m->cuts);
    TAKE(cut_launch, double, m->cuts * m->launches);
    TAKE(low, double, m->cuts * 5);
    TAKE(high, double, m->cuts * 5);
    TAKE(shared, double, 2 * m->support);
    TAKE(own, double, m->cuts * 3 * m->support);
    TAKE(first, int64_t, m->cuts + 1);
    TAKE(place, int64_t, m->configs);
    TAKE(fitted, int64_t, m->configs);
    TAKE(coef, double, m->configs * 5);
    TAKE(weights, double, m->configs * m->support);
    TAKE(span, int64_t, m->configs * 2);
    TAKE(local_slots, int64_t, m->locals);
    TAKE(margin, double, m->locals);
#undef TAKE
    if ((const char *)at != bytes + length) return 0;
    for (int64_t h = 0; h < m->heights; h++)
        if (m->height[h] < 1 || m->height[h] > MAX_SLOTS) return 0;
    if (m->first[0] != 0 || m->first[m->cuts] != m->configs) return 0;
    for (int64_t g = 0; g < m->cuts; g++)
        if (m->cut_height[g] < 0 || m->cut_height[g] >= m->heights || m->first[g] > m->first[g + 1]) return 0;
    for (int64_t c = 0; c < m->configs; c++)
        if (m->place[c] < 0 || m->place[c] >= m->configs) return 0;
    return 1;
}

/* Four partial histograms: consecutive ids are often equal, and an addition must not wait for the one before. Bins are
 * shifted by one, so that the two kinds of padding, -1 and `experts`, have bins of their own, which nobody reads. */
#define COUNT_IDS(name, type, unsigned_type)                                                         \
    static int name(const type *ids, Py_ssize_t n, unsigned_type bins, uint32_t *h)                  \
    {                                                                                                \
        uint32_t *h1 = h + bins, *h2 = h1 + bins, *h3 = h2 + bins;                                   \
        Py_ssize_t i = 0;                                                                            \
        for (; i + 4 <= n; i += 4) {                                                                 \
            unsigned_type a = (unsigned_type)ids[i] + 1, b = (unsigned_type)ids[i + 1] + 1;          \
            unsigned_type c = (unsigned_type)ids[i + 2] + 1, d = (unsigned_type)ids[i + 3] + 1;      \
            if ((a >= bins) | (b >= bins) | (c >= bins) | (d >= bins)) return 0;                     \
            h[a]++, h1[b]++, h2[c]++, h3[d]++;                                                       \
        }                                                                                            \
        for (; i < n; i++) {                                                                         \
            unsigned_type a = (unsigned_type)ids[i] + 1;                                             \
            if (a >= bins) return 0;                                                                 \
            h[a]++;                                                                                  \
        }                                                                                            \
        return 1;                                                                                    \
    }
COUNT_IDS(count_ids32, int32_t, uint32_t)
COUNT_IDS(count_ids64, int64_t, uint64_t)

/* Counts of a C-contiguous int32 or int64 array: of the ids it holds, or, where `experts` is 0, the array itself.
 * Returns their number, or -1 when numpy must look (and find the words for what is wrong). */
static Py_ssize_t read_counts(PyObject *array, Py_ssize_t experts, int64_t *counts)
{
    Py_buffer view;
    Py_ssize_t out = -1;
    if (experts < 0 || experts > MAX_EXPERTS) return -1;
    if (PyObject_GetBuffer(array, &view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0) {
        PyErr_Clear();
        return -1;
    }
    const char *format = view.format;
    int whole = format && strchr("ilq", format[0]) && format[0] && !format[1] && (view.itemsize == 4 || view.itemsize == 8);
    if (whole && (uintptr_t)view.buf % (size_t)view.itemsize == 0 && view.len / view.itemsize < INT32_MAX) {
        Py_ssize_t n = view.len / view.itemsize;
        if (experts == 0) {
            if (view.ndim == 1 && n <= MAX_EXPERTS) {
                for (Py_ssize_t e = 0; e < n; e++)
                    counts[e] = view.itemsize == 4 ? ((const int32_t *)view.buf)[e] : ((const int64_t *)view.buf)[e];
                out = n;
            }
        } else {
            const Py_ssize_t bins = experts + 2;
            uint32_t h[4 * (MAX_EXPERTS + 2)];
            memset(h, 0, 4 * (size_t)bins * sizeof *h);
            if (view.itemsize == 4 ? count_ids32(view.buf, n, (uint32_t)bins, h)
                                   : count_ids64(view.buf, n, (uint64_t)bins, h)) {
                for (Py_ssize_t e = 0; e < experts; e++) {
                    const uint32_t *its = h + e + 1;
                    counts[e] = (int64_t)its[0] + its[bins] + its[2 * bins] + its[3 * bins];
                }
                out = experts;
            }
        }
    }
    PyBuffer_Release(&view);
    return out;
}

static int64_t blocks_of(const int64_t *counts, Py_ssize_t experts, int64_t height)
{
    int64_t blocks = 0;
    if ((height & (height - 1)) == 0) {
        int shift = 0;
        while ((int64_t)1 << shift < height) shift++;
        for (Py_ssize_t e = 0; e < experts; e++) blocks += (counts[e] + height - 1) >> shift;
    } else {
        for (Py_ssize_t e = 0; e < experts; e++) blocks += (counts[e] + height - 1) / height;
    }
    return blocks;
}

/* Of |x| < 2**63, which all arguments are; libm's would be calls. */
static double floor_(double x) { double t = (double)(int64_t)x; return t > x ? t - 1.0 : t; }
static double ceil_(double x) { double t = (double)(int64_t)x; return t < x ? t + 1.0 : t; }
static double clip(double x, double low, double high) { x = x > low ? x : low; return x < high ? x : high; }

static double float_log2(double x)
{
    int64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (double)bits * 0x1p-52 - 1023.0;
}

/* Microseconds of every config. Returns the slots, or -1 for a histogram that numpy must look at. */
static int64_t predict(const Model *m, const int64_t *counts, Py_ssize_t experts, double *us)
{
    const int64_t S = m->support;
    int64_t sum = 0, busy = 0, blocks_at[MAX_HEIGHTS];
    double base[MAX_SUPPORT], near[MAX_SUPPORT];
    for (Py_ssize_t e = 0; e < experts; e++) {
        if (counts[e] < 0 || counts[e] > MAX_SLOTS) return -1;
        sum += counts[e];
        busy += counts[e] != 0;
    }
    if (sum > MAX_SLOTS) return -1;
    for (int64_t h = 0; h < m->heights; h++) blocks_at[h] = blocks_of(counts, experts, m->height[h]);
    const double slots = (double)sum, active = (double)busy;
    const double f0 = clip(float_log2(slots) * 0.25, m->low[0], m->high[0]);
    const double f1 = clip(float_log2(active) * 0.5, m->low[1], m->high[1]);
    for (int64_t s = 0; s < S; s++) base[s] = 1.0 + (fabs(f0 - m->shared[s]) + fabs(f1 - m->shared[S + s]));
    for (int64_t g = 0; g < m->cuts; g++) {
        const double *low = m->low + 5 * g, *high = m->high + 5 * g, *launch = m->cut_launch + g * m->launches;
        const double *p2 = m->own + g * 3 * S, *p3 = p2 + S, *p4 = p3 + S;
        const double blocks = (double)blocks_at[m->cut_height[g]], width = m->cut_slots[g];
        const double ctas = blocks * m->cut_ctas[g];
        double waves = 0.0;
        for (int64_t l = 0; l < m->launches; l++) waves += ceil_(blocks * launch[l] / width);
        const double unused = floor_((waves * width - ctas) / width * 0x1p20) * 0x1p-20;
        const double f2 = clip(float_log2(blocks) * 0.5, low[2], high[2]);
        const double f3 = clip(float_log2(waves) * 0.5, low[3], high[3]);
        const double f4 = clip(unused * 0.125, low[4], high[4]);
        for (int64_t s = 0; s < S; s++) {
            double far = ((fabs(f2 - p2[s]) + base[s]) + fabs(f3 - p3[s])) + fabs(f4 - p4[s]);
            near[s] = (double)(int32_t)(0x1p20 / far); /* far >= 1, so at most 2**20 and floor is truncation */
        }
        for (int64_t k = m->first[g]; k < m->first[g + 1]; k++) {
            const double *w = m->weights + k * S, *coef = m->coef + 5 * k;
            if (!m->fitted[k]) {
                us[m->place[k]] = INFINITY;
                continue;
            }
            /* native.pack lets only weights through with which these sums are exact, hence in any order. */
            double a = 0.0, b = 0.0, c = 0.0, d = 0.0;
            int64_t s = 0;
            for (; s + 4 <= S; s += 4) {
                a += near[s] * w[s];
                b += near[s + 1] * w[s + 1];
                c += near[s + 2] * w[s + 2];
                d += near[s + 3] * w[s + 3];
            }
            for (; s < S; s++) a += near[s] * w[s];
            const double moved = (a + b) + (c + d);
            const double trend = ((coef[0] + coef[3] * active) + coef[4] * slots) + (coef[1] * waves + coef[2] * ctas);
            us[m->place[k]] = trend * (1.0 + clip(moved, -0.6, 1.5)); /* cost.CORRECTION_RANGE */
        }
    }
    return sum;
}

/* bisect_left, and the lower neighbour where it is as near. */
static double margin_at(const Model *m, int64_t slots)
{
    int64_t left = 0, right = m->locals;
    while (left < right) {
        int64_t middle = (left + right) / 2;
        if (m->local_slots[middle] < slots)
            left = middle + 1;
        else
            right = middle;
    }
    if (left == m->locals || (left && slots - m->local_slots[left - 1] <= m->local_slots[left] - slots)) left--;
    return m->margin[left];
}

PyDoc_STRVAR(choose_doc,
"choose(packed, array, num_experts, fallback, choosing_us, outside)\n--\n\n"
"`Local.choose` of the ids in `array`, or, where `num_experts` is 0, of the histogram that it is; None: ask numpy.");

static PyObject *choose(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Model m;
    int64_t counts[MAX_EXPERTS];
    double us[MAX_CONFIGS];
    if (nargs != 6) return PyErr_Format(PyExc_TypeError, "choose takes 6 arguments, not %zd", nargs);
    Py_ssize_t experts = PyNumber_AsSsize_t(args[2], PyExc_OverflowError);
    Py_ssize_t fallback = PyNumber_AsSsize_t(args[3], PyExc_OverflowError);
    double choosing_us = PyFloat_AsDouble(args[4]);
    Py_ssize_t outside = PyNumber_AsSsize_t(args[5], PyExc_OverflowError);
    if (PyErr_Occurred()) return NULL;
    if (!unpack(args[0], &m) || fallback < 0 || fallback >= m.configs) Py_RETURN_NONE;
    experts = read_counts(args[1], experts, counts);
    if (experts < 0) Py_RETURN_NONE;
    int64_t busy = 0;
    for (Py_ssize_t e = 0; e < experts; e++) busy += counts[e] != 0;
    if (!busy) return PyLong_FromSsize_t(fallback);
    int64_t slots = predict(&m, counts, experts, us);
    if (slots < 0) Py_RETURN_NONE;
    /* Fewer active experts than were ever profiled: nothing that was measured is known to be sound. */
    if (float_log2((double)busy) * 0.5 < m.low[1]) return PyLong_FromSsize_t(outside);
    Py_ssize_t best = 0;
    double best_us = INFINITY;
    for (Py_ssize_t c = 0; c < m.configs; c++) {
        if (m.span[2 * c] > 2 * slots || slots > 2 * m.span[2 * c + 1]) continue;
        if (us[c] < best_us) best = c, best_us = us[c];
    }
    double static_us = us[fallback];
    if (!(static_us < INFINITY) || !(static_us - best_us > margin_at(&m, slots) * best_us + choosing_us)) best = fallback;
    return PyLong_FromSsize_t(best);
}

PyDoc_STRVAR(predict_doc,
"predict(packed, counts, out)\n--\n\n"
"Writes `Local.predict` of one histogram into the float64 array `out`; False: ask numpy.");

static PyObject *predict_py(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Model m;
    Py_buffer out;
    int64_t counts[MAX_EXPERTS];
    if (nargs != 3) return PyErr_Format(PyExc_TypeError, "predict takes 3 arguments, not %zd", nargs);
    if (!unpack(args[0], &m)) Py_RETURN_FALSE;
    Py_ssize_t experts = read_counts(args[1], 0, counts);
    if (experts < 0) Py_RETURN_FALSE;
    if (PyObject_GetBuffer(args[2], &out, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | PyBUF_WRITABLE) < 0) return NULL;
    int done = 0;
    if (out.format && !strcmp(out.format, "d") && out.len == m.configs * 8 && (uintptr_t)out.buf % 8 == 0)
        done = predict(&m, counts, experts, out.buf) >= 0;
    PyBuffer_Release(&out);
    return PyBool_FromLong(done);
}

static PyMethodDef methods[] = {
    {"choose", (PyCFunction)(void (*)(void))choose, METH_FASTCALL, choose_doc},
    {"predict", (PyCFunction)(void (*)(void))predict_py, METH_FASTCALL, predict_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "rampwrap.model._score", "The default model's choice in one call.", 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__score(void) { return PyModuleDef_Init(&definition); }
