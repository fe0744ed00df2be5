"""What timm's architectures are found to have, on the meta device and in the table that ships."""

import os

import pytest
import timm
import torch

from headprobe.backbone.capture.layer_facts import layer_facts
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.preparation import data_config
from headprobe.catalog.families import NO_HEADS, FamilyTable, Tally, shipped_families
from headprobe.catalog.survey import family_of_names, survey, walk

TABLE = shipped_families()

same_timm = pytest.mark.skipif(
    timm.__version__ != TABLE.timm, reason=f"the table is of timm {TABLE.timm}, installed is {timm.__version__}"
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_the_table_that_ships_holds_every_name_with_multi_head_attention() -> None:
    families = TABLE.with_heads.values()
    total = Tally.total(family.tally for family in families)
    assert (len(families), len(TABLE.classes), total.layers, total.heads) == (51, 58, 13_285, 177_215)
    assert sum(len(family.models) for family in families) == 671
    assert sum(heads for family in families for _, heads in family.models.values()) == 177_215
    assert sum(len(family.names) for family in TABLE.families.values()) == 1371


def test_652_names_of_48_timm_families_have_maps_in_every_layer_and_the_others_are_linear_attention() -> None:
    families = TABLE.with_heads.values()
    total = Tally.total(family.tally for family in families)
    assert sum(family.mapped for family in families) == 652
    assert sum(family.mapped == len(family.models) for family in families) == 48
    assert (total.with_maps, total.maps["none"]) == (13_050, 235)
    linear = {kind for kind, one in TABLE.classes.items() if "none" in one.tally.maps}
    assert {kind.rpartition(".")[2] for kind in linear} == {"FactorAttnConvRelPosEnc", "LiteMLA", "LambdaLayer"}


def test_676_names_have_no_heads_and_24_a_single_one_by_design() -> None:
    numbers = {reason: {name: len(names) for name, names in by.items()} for reason, by in TABLE.refused.items()}
    assert sum(numbers.pop(NO_HEADS).values()) == 676
    assert all("single head by design" in reason for reason in numbers)
    single = {name: count for by_family in numbers.values() for name, count in by_family.items()}
    assert single == {"iformer": 9, "mobilevit": 7, "shvit": 4, "swiftformer": 4}


@pytest.mark.parametrize(
    ("kind", "names", "layers"),
    [
        ("timm.layers.attention.Attention", 237, 4783),
        ("timm.models.eva.EvaAttention", 36, 784),
        ("timm.models.maxxvit.AttentionCl", 35, 1007),
        ("timm.models.swin_transformer.WindowAttention", 9, 204),
        ("timm.models.xcit.XCA", 28, 528),
        ("timm.models.nest.Attention", 6, 120),
    ],
)
def test_classes_occur_as_often_as_counted_by_hand_of_timms_sources(kind: str, names: int, layers: int) -> None:
    assert (TABLE.classes[kind].names, TABLE.classes[kind].tally.layers) == (names, layers)


def test_layers_with_and_without_a_statistic_add_up_to_all() -> None:
    for family in TABLE.with_heads.values():
        tally = family.tally
        assert tally.layers == sum(layers for layers, _ in family.models.values())
        assert tally.layers == sum(tally.kinds.values()) == sum(tally.maps.values())
        assert all(0 <= tally.defined(statistic) < tally.layers for statistic in tally.undefined)


def test_statistics_of_weights_are_defined_exactly_where_the_map_is_weights() -> None:
    for one in TABLE.classes.values():
        assert one.tally.defined("entropy_all_keys_nats") == one.tally.maps.get("weights", 0)


def test_the_table_is_small_and_reads_back_as_written() -> None:
    text = TABLE.to_json()
    assert FamilyTable.from_json(text) == TABLE
    assert len(text) < 150_000


@same_timm
@pytest.mark.parametrize("family", TABLE.with_heads)
def test_the_name_with_the_fewest_layers_is_found_as_the_table_says(family: str) -> None:
    models = TABLE.families[family].models
    record = walk(min(models, key=lambda name: models[name]))
    assert record.family == family
    assert (record.tally.layers, record.tally.heads) == models[record.name]
    for kind, tally in record.classes.items():
        whole = TABLE.families[family].classes[kind].tally
        assert set(tally.kinds) <= set(whole.kinds)
        assert set(tally.maps) <= set(whole.maps)
        for statistic, whole_whys in whole.undefined.items():
            whys = tally.undefined.get(statistic, {})
            assert set(whys) <= set(whole_whys)
            assert tally.defined(statistic) <= whole.defined(statistic)


@pytest.mark.parametrize("name", ["test_vit3", "swin_tiny_patch4_window7_224", "cait_xxs24_224", "levit_128s"])
def test_what_is_defined_does_not_depend_on_the_numbers_that_the_meta_device_has_none_of(name: str) -> None:
    def undefined(model: torch.nn.Module) -> list[tuple[object, ...]]:
        layout = find_heads(model, data_config(model)["input_size"], name)
        facts = layer_facts(model, layout)
        return [(fact.outputs, fact.attention, fact.undefined, fact.projection is None) for fact in facts]

    with torch.device("meta"):
        shapes_alone = undefined(timm.create_model(name))
    assert shapes_alone == undefined(timm.create_model(name))


def test_models_are_refused_in_the_same_words() -> None:
    assert walk("resnet18").refused == walk("convnext_atto").refused == NO_HEADS
    assert walk("shvit_s1").refused == "attention with a single head by design: single-head self-attention"


def test_a_timm_family_is_a_module_and_a_bundled_model_has_that_of_its_architecture() -> None:
    assert (walk("deit_tiny_patch16_224").family, walk("digits_vit").family) == ("deit", "vision_transformer")
    assert walk("levit_128s.fb_dist_in1k").family == "levit"
    assert set(family_of_names()) == set(timm.list_models())


def test_attention_without_heads_beside_the_heads_is_counted() -> None:
    assert walk("csatv2").headless == 14


def test_progress_is_reported_after_every_model() -> None:
    seen: list[tuple[int, int]] = []
    survey(["resnet18", "test_vit"], progress=lambda walked, of: seen.append((walked, of)))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.slow
@same_timm
def test_every_fourth_name_of_timm_is_found_as_the_table_that_ships_says() -> None:
    names = sorted(timm.list_models())[::4]
    found = survey(names, workers=min(2, os.cpu_count() or 1))
    assert sum(len(family.names) for family in found.families.values()) == len(names)
    for name, family in found.families.items():
        shipped = TABLE.families[name]
        assert family.models.items() <= shipped.models.items()
        for reason, refused in family.refused.items():
            assert set(refused) <= set(shipped.refused[reason])
