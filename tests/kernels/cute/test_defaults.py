"""The default config: legal for every layer, by the mean tokens of an expert alone, and what kernels of few configs fall back on."""

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rampwrap.kernel.shape import SHAPES, MoEShape
from rampwrap.kernels.cute.configs import FORMS, GROUP_MS, all_configs, why_illegal
from rampwrap.kernels.cute.defaults import RULES, default, lacking

LAYERS = [attrs.evolve(shape, dtype=dtype) for shape in SHAPES.values() for dtype in RULES]


def listed(shape, forms=FORMS):
    """Configs of the adapter for a layer."""
    legal = [c for form in forms for c in all_configs(form, shape.dtype) if why_illegal(c, shape) is None]
    return [config.keys(group_m) for config in legal for group_m in GROUP_MS]


# A config runs a layer or not whatever the tokens, and the kernel's own list holds none that does not.
CONFIGS = {shape: configs for shape in LAYERS if (configs := listed(shape))}


def chosen(shape, num_tokens, configs=None):
    configs = CONFIGS[shape] if configs is None else configs
    return configs[default(configs, shape, num_tokens)]


def test_most_layers_have_configs():
    without = {str(shape) for shape in LAYERS} - {str(shape) for shape in CONFIGS}
    assert without == {str(attrs.evolve(SHAPES["gpt-oss-120b"], dtype="fp8"))}


@given(st.sampled_from(sorted(CONFIGS, key=str)), st.integers(0, 1 << 17))
def test_is_the_same_each_time_and_of_the_order_that_shares_no_weights(shape, num_tokens):
    config = chosen(shape, num_tokens)
    assert config == chosen(shape, num_tokens, CONFIGS[shape][::-1]) and config["group_m"] == 1


@given(st.sampled_from(sorted(CONFIGS, key=str)), st.integers(0, 1 << 14), st.integers(0, 1 << 14))
def test_forms_follow_each_other_and_tiles_grow(shape, first, second):
    """One launch, two, ragged, prefill, never back; more tokens never take a smaller block_m of a form."""
    order = ("one", "two", "ragged", "prefill")
    low, high = (chosen(shape, tokens) for tokens in sorted((first, second)))
    assert order.index(low["form"]) <= order.index(high["form"])
    assert low["form"] != high["form"] or low["block_m"] <= high["block_m"]


@given(st.sampled_from(sorted(CONFIGS, key=str)), st.integers(0, 1 << 14), st.data())
def test_few_configs_serve_too(shape, num_tokens, data):
    """A kernel with some of the configs runs the nearest of them; with the one that the whole list would run, that one."""
    configs = CONFIGS[shape]
    few = data.draw(st.lists(st.sampled_from(configs), min_size=1, max_size=5))
    found, whole = chosen(shape, num_tokens, few), chosen(shape, num_tokens)
    assert found in few
    if whole in few:
        assert found == whole
    forms = {config["form"] for config in few}
    assert whole["form"] not in forms or found["form"] == whole["form"]


def test_what_was_measured_lacks_nothing():
    """All published layers but the one whose hidden size only tiles of 64 rows divide, whole and cut eight ways."""
    cut = {
        attrs.evolve(its, intermediate_size=its.intermediate_size // ranks) for its in CONFIGS for ranks in (1, 2, 4, 8)
    }
    far = {str(shape) for shape in cut if (configs := listed(shape)) and lacking(configs, shape)}
    assert far == {str(SHAPES["gpt-oss-120b"])}


@pytest.mark.parametrize("shape", [attrs.evolve(SHAPES["olmoe"], dtype=dtype) for dtype in RULES], ids=str)
def test_what_a_library_of_few_kernels_lacks(shape):
    """Two launches alone are ahead of vLLM's at every token count, and so is the ragged form; one launch and prefill are for their ends."""
    alone = {form: lacking(listed(shape, (form,)), shape) for form in FORMS}
    assert (
        alone["two"] is None
        and alone["ragged"] is None
        and "form=one" in alone["one"]
        and "for 1 tokens, form=prefill" in alone["prefill"]
    )
    assert lacking(listed(shape, ("one", "prefill")), shape) and lacking(listed(shape, ("one", "two")), shape) is None
    for narrow in ({"block_n": 16, "warp_n": 4}, {"block_m": 8}):
        few = [its for its in listed(shape, ("two",)) if all(its[key] == value for key, value in narrow.items())]
        assert few and lacking(few, shape), narrow


@given(st.sampled_from(sorted(CONFIGS, key=str)), st.data())
def test_nothing_is_lacking_where_the_defaults_are_there(shape, data):
    """Whatever else is not: the choice and the judgement go by the same configs."""
    configs = CONFIGS[shape]
    needed = {default(configs, shape, tokens) for power in range(17) for tokens in (1 << power, 3 << power)}
    few = sorted(needed | data.draw(st.sets(st.integers(0, len(configs) - 1), max_size=20)))
    assert lacking([configs[index] for index in few], shape) == lacking(configs, shape)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_alone_serves_every_batch(form):
    for dtype in RULES:
        shape = attrs.evolve(SHAPES["olmoe"], dtype=dtype)
        configs = listed(shape, (form,))
        assert {chosen(shape, tokens, configs)["form"] for tokens in (0, 1, 64, 4096, 1 << 16)} == {form}


def short(config):
    return "{form} {block_m}x{block_n}x{warp_n} {stages}".format(**config)


WITHOUT = tuple(form for form in FORMS if form != "ragged")


def test_what_serves_by_the_tokens_of_an_expert():
    """The rule in full, of a layer with eight tokens of the batch for each of an expert."""
    fp8, bf16 = (attrs.evolve(SHAPES["olmoe"], dtype=dtype) for dtype in ("fp8", "bf16"))
    means = (0.25, 2, 2.5, 5.75, 6, 11.75, 12, 23.75, 24, 4096)
    assert [short(chosen(fp8, int(8 * mean))) for mean in means] == [
        *("one 8x32x4 4", "one 8x32x4 4", "two 24x64x4 4", "two 32x64x4 4", "ragged 40x64x4 4", "ragged 40x64x4 4"),
        *("ragged 64x32x8 4", "ragged 64x32x8 4", "prefill 128x256x8 4", "prefill 128x256x8 4"),
    ]
    means = (0.25, 2, 2.5, 11.875, 12, 47.875, 48, 95.875, 96, 127, 128, 4096)
    assert [short(chosen(bf16, int(8 * mean))) for mean in means] == [
        *(
            "one 16x32x4 6",
            "one 16x32x4 6",
            "ragged 64x32x4 6",
            "ragged 64x32x4 6",
            "ragged 96x32x4 6",
            "ragged 96x32x4 6",
        ),
        *("ragged 112x32x8 4", "ragged 112x32x8 4", "ragged 144x32x8 4", "ragged 144x32x8 4"),
        *("prefill 128x256x8 4", "prefill 128x256x8 4"),
    ]


@pytest.mark.parametrize("dtype", RULES)
def test_a_rank_with_some_of_the_experts_takes_the_ragged_form_from_a_mean_of_its_own(dtype):
    shape = MoEShape(256, 8, 7168, 2048, dtype, num_local_experts=32)
    configs = listed(shape)
    assert [chosen(shape, tokens, configs)["form"] for tokens in (32, 64, 80, 128)] == [
        "one",
        "one",
        "ragged",
        "ragged",
    ]
    whole = attrs.evolve(shape, num_local_experts=256)
    assert chosen(whole, 47, listed(whole))["form"] == "one"


def test_what_serves_from_a_library_without_the_ragged_form():
    """As before there was one: a list without it is that of an older library, which lacks nothing."""
    fp8, bf16 = (attrs.evolve(SHAPES["olmoe"], dtype=dtype) for dtype in ("fp8", "bf16"))
    older = {shape: listed(shape, WITHOUT) for shape in (fp8, bf16)}
    assert all(lacking(configs, shape) is None for shape, configs in older.items())
    means = (0.25, 2, 2.5, 8, 12, 23, 24, 4096)
    assert [short(chosen(fp8, int(8 * mean), older[fp8])) for mean in means] == [
        *("one 8x32x4 4", "one 8x32x4 4", "two 24x64x4 4", "two 32x64x4 4", "two 40x64x4 4", "two 56x64x4 4"),
        *("prefill 128x256x8 4", "prefill 128x256x8 4"),
    ]
    means = (0.25, 4, 5, 20, 47, 48, 119, 120, 127, 128, 4096)
    assert [short(chosen(bf16, int(8 * mean), older[bf16])) for mean in means] == [
        *("one 16x32x4 6", "one 16x32x4 6", "two 40x32x4 6", "two 88x32x4 6", "two 88x32x4 6", "two 112x32x8 4"),
        *("two 112x32x8 4", "two 144x32x8 4", "two 144x32x8 4", "prefill 128x256x8 4", "prefill 128x256x8 4"),
    ]


@pytest.mark.parametrize("shape", [attrs.evolve(SHAPES["olmoe"], dtype=dtype) for dtype in RULES], ids=str)
@pytest.mark.parametrize(
    "others", [("one",), ("two",), ("prefill",), ("one", "two"), ("one", "prefill"), ("two", "prefill")], ids=str
)
def test_the_ragged_form_stands_in_for_what_a_library_lacks(shape, others):
    """For two launches anywhere, for the others at their ends."""
    configs = listed(shape, (*others, "ragged"))
    assert lacking(configs, shape) is None
    forms = {chosen(shape, tokens, configs)["form"] for tokens in (0, 1, 32, 64, 128, 4096, 1 << 16)}
    assert "ragged" in forms and forms <= {*others, "ragged"}


@pytest.mark.parametrize(
    ("shape", "narrow"),
    [
        (MoEShape(128, 8, 2048, 768, "fp8"), 1),
        (MoEShape(64, 8, 2048, 1024, "fp8"), 0),
        (MoEShape(256, 8, 7168, 256, "fp8"), 3),
        # A quarter of the experts here, so a quarter of the tiles.
        (MoEShape(256, 8, 7168, 256, "fp8", 64), 12),
        (MoEShape(8, 2, 4096, 14336), 0),
    ],
)
def test_few_tokens_take_narrow_tiles_where_wide_ones_leave_sms_idle(shape, narrow):
    configs = listed(shape)
    its = [tokens for tokens in range(1, 33) if chosen(shape, tokens, configs)["block_n"] == 16]
    assert its == list(range(1, narrow + 1))
