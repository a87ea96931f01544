/* The wave model's choice in one call: histogram, features, prediction, guard. Optional; see compiled.py.
 *
 * Features, distances and their weighted sums are integers, as on the GPU; what is left are additions, products, IEEE
 * divisions and roundings to whole numbers, in the order of rampwrap.model.wave, so that all give the same bits.
 * Compile without -ffast-math and with -ffp-contract=off. Whatever is unusual is answered by None, and numpy serves.
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

enum { SHARED = 8, CUT = 16, CONFIG = 4, LAUNCHES = 4, MAX_BLOCK_M = 1024 }; /* as in packed.py */
enum { MAX_EXPERTS = 2048, MAX_CONFIGS = 1024, MAX_POINTS = 256 };     /* all scratch is on the stack */
enum { MAX_SLOTS = (1 << 22) - 1, MAX_WAVES = (1 << 23) - 1 };         /* a float has all bits of them */
enum { ONE = 1 << 23 };                                                /* of features and distances */

/* `packed.Packed` as bytes: 4-byte integers, then doubles, arrays in this order. */
typedef struct {
    int64_t cuts, configs, points, margins;
    const int32_t *shared;                  /* [SHARED] ranges of slots and active experts, the four sizes */
    const int32_t *cut;                     /* [cuts][CUT] */
    const int32_t *config;                  /* [configs][CONFIG] */
    const int32_t *slots, *active;          /* [points] */
    const int32_t *blocks, *waves, *unused; /* [cuts][points] */
    const int32_t *weights;                 /* [configs][points] */
    const int32_t *limits;                  /* [margins + 1] */
    const double *coef;                     /* [configs][5] */
    const double *range;                    /* [4] of the correction, and what only the GPU reads */
    const double *margin;                   /* [margins] */
} Model;

/* Of a cut, and of a config. */
enum { BLOCK_M, RECIPROCAL, AT_A_TIME, CTAS, BLOCKS, WAVES = 6, UNUSED = 8, LAUNCH = 10, FIRST = 14, END };
enum { LEAST, TWICE_MOST, FITTED, PLACE };

/* Sizes and places are checked, so no bytes whatever can make the code below leave its arrays. */
static int unpack(PyObject *packed, Model *m)
{
    char *bytes;
    Py_ssize_t length;
    if (!PyBytes_Check(packed) || PyBytes_AsStringAndSize(packed, &bytes, &length) < 0) {
        PyErr_Clear();
        return 0;
    }
    if (length < SHARED * 4 || (uintptr_t)bytes % 8) return 0;
    const int32_t *at = m->shared = (const int32_t *)bytes;
    m->cuts = at[4], m->configs = at[5], m->points = at[6], m->margins = at[7];
    if (m->configs < 1 || m->configs > MAX_CONFIGS || m->cuts < 1 || m->cuts > m->configs || m->points < 1 ||
        m->points > MAX_POINTS || m->margins < 1 || m->margins > 1 << 20)
        return 0;
    at += SHARED;
#define TAKE(field, count) (m->field = at, at += (count))
    TAKE(cut, m->cuts * CUT);
    TAKE(config, m->configs * CONFIG);
    TAKE(slots, m->points);
    TAKE(active, m->points);
    TAKE(blocks, m->cuts * m->points);
    TAKE(waves, m->cuts * m->points);
    TAKE(unused, m->cuts * m->points);
    TAKE(weights, m->configs * m->points);
    TAKE(limits, m->margins + 1);
#undef TAKE
    m->coef = (const double *)(at + (at - m->shared) % 2);
    m->range = m->coef + 5 * m->configs;
    m->margin = m->range + 4;
    if ((const char *)(m->margin + m->margins) != bytes + length) return 0;
    int64_t first = 0;
    for (const int32_t *cut = m->cut; cut < m->config; cut += CUT) {
        if (cut[BLOCK_M] < 1 || cut[BLOCK_M] > MAX_BLOCK_M || cut[AT_A_TIME] < 1) return 0;
        if (cut[FIRST] != first || cut[END] < first) return 0;
        first = cut[END];
    }
    if (first != m->configs) return 0;
    for (const int32_t *config = m->config; config < m->slots; config += CONFIG)
        if (config[PLACE] < 0 || config[PLACE] >= m->configs) return 0;
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

/* M blocks; counts are below 2**22, so the high word of the product is the quotient. */
static int64_t blocks_of(const int64_t *counts, Py_ssize_t experts, int64_t slots, const int32_t *cut)
{
    const uint64_t up = (uint64_t)cut[BLOCK_M] - 1, reciprocal = (uint32_t)cut[RECIPROCAL];
    int64_t blocks = 0;
    if (!up) return slots;
    for (Py_ssize_t e = 0; e < experts; e++) blocks += (int64_t)(((uint64_t)counts[e] + up) * reciprocal >> 32);
    return blocks;
}

/* Of 0 <= x < 2**63; libm's would be a call. */
static double ceil_(double x) { double t = (double)(int64_t)x; return t < x ? t + 1.0 : t; }
static double clip(double x, double low, double high) { x = x > low ? x : low; return x < high ? x : high; }
static int32_t within(int32_t x, const int32_t *range) { return x < range[0] ? range[0] : x > range[1] ? range[1] : x; }
/* Without the undefined overflow that damaged bytes could bring about. */
static int32_t apart(int32_t a, int32_t b)
{
    int32_t d = (int32_t)((uint32_t)a - (uint32_t)b);
    return d < 0 ? (int32_t)(0u - (uint32_t)d) : d;
}
static int32_t plus(int32_t a, int32_t b) { return (int32_t)((uint32_t)a + (uint32_t)b); }

/* `features.float_log2` in units of 2**-23; 0 of 0, which is below every range as well. */
static int32_t log2_bits(int64_t n)
{
    float x = (float)n;
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return n ? bits - 0x3F800000 : 0;
}

/* Microseconds of every config. Returns the slots, or -1 for a histogram that numpy must look at. */
static int64_t predict(const Model *m, const int64_t *counts, Py_ssize_t experts, double *us)
{
    const int64_t S = m->points;
    int64_t slots = 0, active = 0, blocks = 0, height = -1;
    int32_t base[MAX_POINTS];
    double near[MAX_POINTS];
    for (Py_ssize_t e = 0; e < experts; e++) {
        if (counts[e] < 0 || counts[e] > MAX_SLOTS) return -1;
        slots += counts[e];
        active += counts[e] != 0;
    }
    if (slots > MAX_SLOTS) return -1;
    const int32_t f0 = within(log2_bits(slots) >> 2, m->shared), f1 = within(log2_bits(active) >> 1, m->shared + 2);
    for (int64_t s = 0; s < S; s++) base[s] = plus(ONE, plus(apart(f0, m->slots[s]), apart(f1, m->active[s])));
    for (int64_t g = 0; g < m->cuts; g++) {
        const int32_t *cut = m->cut + g * CUT, *p2 = m->blocks + g * S, *p3 = m->waves + g * S, *p4 = m->unused + g * S;
        if (cut[BLOCK_M] != height) blocks = blocks_of(counts, experts, slots, cut), height = cut[BLOCK_M];
        const double width = cut[AT_A_TIME], ctas = (double)blocks * cut[CTAS];
        double waves = 0.0;
        for (int l = 0; l < LAUNCHES; l++)
            if (cut[LAUNCH + l]) waves += ceil_((double)blocks * cut[LAUNCH + l] / width);
        if (!(waves <= (double)MAX_WAVES)) return -1;
        const int32_t f2 = within(log2_bits(blocks) >> 1, cut + BLOCKS), f3 = within(log2_bits((int64_t)waves) >> 1, cut + WAVES);
        /* Within the range first, so that it fits an integer, which cuts it down to a multiple of 2**-20. */
        const int32_t f4 = (int32_t)clip((waves * width - ctas) / width * 0x1p20, cut[UNUSED], cut[UNUSED + 1]);
        for (int64_t s = 0; s < S; s++) {
            int32_t far = plus(plus(base[s], apart(f2, p2[s])), plus(apart(f3, p3[s]), apart(f4, p4[s])));
            far = far < ONE ? ONE : far; /* which only damaged bytes make it */
            near[s] = (double)(int32_t)(0x1p43 / (double)far);
        }
        for (int64_t k = cut[FIRST]; k < cut[END]; k++) {
            const int32_t *w = m->weights + k * S, *config = m->config + k * CONFIG;
            const double *coef = m->coef + 5 * k;
            if (!config[FITTED]) {
                us[config[PLACE]] = INFINITY;
                continue;
            }
            /* Whole numbers below 2**53, see packed.py, which add up exactly in any order. */
            double a = 0.0, b = 0.0, c = 0.0, d = 0.0;
            int64_t s = 0;
            for (; s + 4 <= S; s += 4) {
                a += near[s] * w[s];
                b += near[s + 1] * w[s + 1];
                c += near[s + 2] * w[s + 2];
                d += near[s + 3] * w[s + 3];
            }
            for (; s < S; s++) a += near[s] * w[s];
            const double moved = ((a + b) + (c + d)) * 0x1p-40;
            const double trend = ((coef[0] + coef[3] * (double)active) + coef[4] * (double)slots) + (coef[1] * waves + coef[2] * ctas);
            us[config[PLACE]] = trend * (1.0 + clip(moved, m->range[0], m->range[1]));
        }
    }
    return slots;
}

/* A step function of the slots: the first margin whose upper limit they do not exceed. */
static double margin_at(const Model *m, int64_t slots)
{
    int64_t i = 0;
    while (i + 1 < m->margins && m->limits[i + 1] < 2 * slots) i++;
    return m->margin[i];
}

PyDoc_STRVAR(choose_doc,
"choose(layout, array, num_experts, fallback, choosing_us, outside)\n--\n\n"
"`Wave.choose` of the ids in `array`, or, where `num_experts` is 0, of the histogram that it is; None: ask numpy.");

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
    if (log2_bits(busy) >> 1 < m.shared[2]) return PyLong_FromSsize_t(outside);
    Py_ssize_t best = 0;
    double best_us = INFINITY;
    for (const int32_t *config = m.config; config < m.slots; config += CONFIG) {
        const Py_ssize_t place = config[PLACE];
        if (config[LEAST] > 2 * slots || slots > config[TWICE_MOST]) continue;
        if (us[place] < best_us || (us[place] == best_us && place < best)) best = place, best_us = us[place];
    }
    double static_us = us[fallback];
    if (!(static_us < INFINITY) || !(static_us - best_us > margin_at(&m, slots) * best_us + choosing_us)) best = fallback;
    return PyLong_FromSsize_t(best);
}

PyDoc_STRVAR(predict_doc,
"predict(layout, counts, out)\n--\n\n"
"Writes `Wave.predict` of one histogram into the float64 array `out`; False: ask numpy.");

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
    PyModuleDef_HEAD_INIT, "rampwrap.model._score", "The wave model's choice in one call.", 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__score(void) { return PyModuleDef_Init(&definition); }
