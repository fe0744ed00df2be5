"""Every column of every table that a run writes: its type and its unit, for all who read the tables.

docs/results.md and docs/describe_heads.md define what each column holds.
"""

from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    """What the cells of a column are."""

    TEXT = "str"
    INTEGER = "int64"
    FLOAT = "float64"


class Column(NamedTuple):
    """A column of any table; one name means the same in all of them."""

    kind: Kind
    unit: str = ""  #: as in the docs: `images`, `nats`, ...; empty without one


AS_QUANTITY = "as the quantity"
"""The unit of numbers whose row says what they are of: its column `quantity`."""

_TEXTS = (
    "mask mask_a mask_b ablation ablation_a ablation_b calibration test_family kind players interval layers order "
    "quantity target scope score rows series profile name source reason"
)

_INTEGERS = {
    "": "draw counts layer head layer_a head_a layer_b head_b class unit row label",
    "images": "images images_chosen images_judged top1_count top5_count right_to_wrong wrong_to_right nonfinite",
    "heads": (
        "heads heads_masked heads_removed heads_without_mask heads_without_score most_removed removable_1pp "
        "removable_1pp_surely removable_5pp removable_5pp_surely"
    ),
    "orders": "orders reversed",
    "masks": "masks",
    "draws": "draws",
    "dims": "rank kept_dims",
}

_FLOATS = {
    "": (
        "spearman spearman_low spearman_high kendall kendall_low kendall_high split_half reliability ceiling "
        "gradient_abs_l2 stable_rank mutual_information confidence class_mass register_mass self_mass sink_mass "
        "value_weighted_attention output_norm_ratio attention_distance_ratio entropy_ratio high_frequency "
        "contribution_high_frequency svcca_mean cca_mean pwcca_mean cka_mean cka_unbiased_mean procrustes_mean "
        "log_amplitude delta_log_amplitude delta_se feature_cosine feature_cosine_low feature_cosine_high "
        "feature_distance feature_distance_low feature_distance_high"
    ),
    "fraction": (
        "top1 top5 agreement area area_low area_high minus_random minus_random_low minus_random_high feature_area "
        "feature_area_low feature_area_high feature_minus_random feature_minus_random_low feature_minus_random_high"
    ),
    "percentage points": "drop_pp drop_low_pp drop_high_pp",
    "nats": (
        "nll kl_nats nll_rise nll_rise_low nll_rise_high log_e_value gradient_abs taylor_zero taylor_mean entropy_nats "
        "entropy_all_keys_nats"
    ),
    "nats^2": "gradient_fisher",
    "squared activations": "variance_after_projection residual_variance_after_projection",
    "logits": "direct_logit",
    "probability": "mcnemar_p bh_q e_bh_q p p_smallest",
    "%": "percentile",
    "pixels": "attention_distance_px attention_distance_raw_px",
    "pi rad/sample": "frequency",
    AS_QUANTITY: (
        "sum_a sum_a_low sum_a_high sum_b sum_b_low sum_b_high b_minus_a b_minus_a_low b_minus_a_high value value_low "
        "value_high value_se_orders value_se_images draws_mean draws_low draws_high rise_a rise_b rise_both "
        "interaction interaction_low interaction_high"
    ),
}

COLUMNS: dict[str, Column] = dict.fromkeys(_TEXTS.split(), Column(Kind.TEXT))
"""Every column by its name. Standard errors of `heads.csv`, `NAME_se`, are as the column NAME; columns of a user's own
statistic are floats."""

for _unit, _names in _INTEGERS.items():
    COLUMNS |= dict.fromkeys(_names.split(), Column(Kind.INTEGER, _unit))
for _unit, _names in _FLOATS.items():
    COLUMNS |= dict.fromkeys(_names.split(), Column(Kind.FLOAT, _unit))

MAY_BE_EMPTY: dict[str, frozenset[str]] = {
    "heads.csv": frozenset({"rank", "kept_dims"}),
    "images.parquet": frozenset({"label"}),
    "interactions.csv": frozenset({"layer_a", "head_a", "layer_b", "head_b"}),
    "orders.csv": frozenset({"removable_1pp", "removable_1pp_surely", "removable_5pp", "removable_5pp_surely"}),
    "shapley.csv": frozenset({"head"}),
}
"""Columns of whole numbers, by table, with cells that may be empty: a whole layer has no number of a head."""


def unit_of(name: str) -> str:
    """Return the unit of a column, empty without one; a standard error `NAME_se` has that of NAME."""
    column = COLUMNS.get(name) or COLUMNS.get(name.removesuffix("_se"))
    return column.unit if column else ""
