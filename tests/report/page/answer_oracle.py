"""The numbers of every sentence, computed from a run's CSV files without headprobe: csv, numpy, scipy, statsmodels."""

import csv
import json
import math
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

Line = dict[str, str]
Numbers = dict[str, float]
NAN = math.nan


def lines(folder: Path, name: str) -> list[Line]:
    if not (folder / name).is_file():
        return []
    with (folder / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def number(cell: str) -> float:
    return float(cell) if cell else NAN


def limits(line: Line, column: str, as_name: str = "", prefix: str = "") -> Numbers:
    """The limits of a column that has some, under the names that sentences give them."""
    stem, unit = (column[:-3], "_pp") if column.endswith("_pp") else (column, "")
    found = {f"{prefix}{as_name or stem}_{end}{unit}": number(line[f"{stem}_{end}{unit}"]) for end in ("low", "high")}
    return {} if any(math.isnan(value) for value in found.values()) else found


class Files:
    """A run's masks, each with its heads, and the ablation that sentences are about."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.baseline, *self.masks = lines(folder, "masks.csv")
        self.images = int(self.baseline["images"])
        named = json.loads((folder / "masks.json").read_text())
        del named["schema"]
        self.heads = {
            name: {(int(layer), head) for layer, own in one["masked_heads"].items() for head in own}
            for name, one in named.items()
        }
        self.curve = {name: one["curve"] for name, one in named.items()}
        self.record = json.loads((folder / "run.json").read_text())
        self.per_layer = self.record["model"]["heads_per_layer"]
        kinds = [line["ablation"] for line in self.masks]
        self.kind = "zero" if "zero" in kinds else kinds[0] if kinds else ""
        self.draws = len({line["draw"] for line in self.masks if line["ablation"] == self.kind})

    def sets(self, kind: str = "") -> list[Line]:
        """One row for every set of heads under an ablation (else the main): tested names before others, draw 0."""
        own = [line for line in self.masks if line["ablation"] == (kind or self.kind) and line["draw"] == "0"]
        own = [line for line in own if self.heads[line["mask"]]]
        found: dict[tuple[tuple[int, int], ...], Line] = {}
        for line in sorted(own, key=lambda line: not line["test_family"]):
            found.setdefault(tuple(sorted(self.heads[line["mask"]])), line)
        order = [line["mask"] for line in own]
        return sorted(found.values(), key=lambda line: order.index(line["mask"]))

    def layers(self) -> dict[int, Line]:
        found = {}
        for line in self.sets():
            touched = {layer for layer, _ in self.heads[line["mask"]]}
            if len(touched) == 1 and len(self.heads[line["mask"]]) == self.per_layer[min(touched)]:
                found[min(touched)] = line
        return found

    def singles(self) -> dict[tuple[int, int], Line]:
        return {min(self.heads[line["mask"]]): line for line in self.sets() if line["heads_masked"] == "1"}

    def mean(self, mask: str, kind: str, column: str) -> float:
        """The mean over draws of a mask."""
        return float(
            np.mean([number(line[column]) for line in self.masks if (line["mask"], line["ablation"]) == (mask, kind)])
        )


def drop(line: Line) -> float:
    return 100 * (int(line["right_to_wrong"]) - int(line["wrong_to_right"])) / int(line["images"])


def power(images: int, true_drop: float, churn: float) -> float:
    """The probability of p < 0.05, over all tables of flips: drop and churn are fractions."""
    lost, won = np.meshgrid(np.arange(images + 1), np.arange(images + 1), indexing="ij")
    possible = lost + won <= images
    flips = np.stack([lost[possible], won[possible]], axis=1)
    table = np.column_stack([flips, images - flips.sum(axis=1)])
    rates = [churn / 2 + true_drop, churn / 2, 1 - churn - true_drop]
    z = np.abs(flips[:, 0] - flips[:, 1]) / np.sqrt(np.maximum(flips.sum(axis=1), 1))
    return float(stats.multinomial.pmf(table, images, rates)[z > stats.norm.ppf(0.975)].sum())


def tested(rows: Iterable[Line], images: int, power_told: bool) -> Numbers:
    rows = list(rows)
    q = [number(row["bh_q"]) for row in rows if row["bh_q"]]
    if not q:
        return {}
    real = sum(value < 0.05 for value in q)
    found: Numbers = {"tested": len(q)}
    found |= {"significant": real, "number": real} if real else {"smallest_q": min(q)}
    return found if real == len(q) or not power_told else found | resolved(rows, images)


def resolved(rows: list[Line], images: int) -> Numbers:
    churn = np.median([2 * min(int(row["right_to_wrong"]), int(row["wrong_to_right"])) / images for row in rows])
    return {"images": images, "churn": float(churn), "resolvable": NAN}  # the test finds the drop by its power


def about_masks(files: Files) -> dict[str, Numbers]:
    images, right = files.images, int(files.baseline["top1_count"])
    low, high = proportion_confint(right, images, method="wilson")
    found: dict[str, Numbers] = {
        "baseline": {"right": right, "images": images, "top1": right / images, "top1_low": low, "top1_high": high}
    }
    if classes := files.record["data"].get("chosen_among"):
        found["baseline"]["classes"] = classes
    layers, singles, rows = files.layers(), files.singles(), files.sets()
    if len(layers) > 1:
        unclear = len(singles) > 1 and any(number(line["bh_q"]) >= 0.05 for line in singles.values())
        found["layers"] = tested(layers.values(), images, power_told=not unclear)
        for place, (layer, line) in enumerate(sorted(layers.items(), key=lambda one: -drop(one[1]))[:3], start=1):
            found["layers"] |= {f"{place}_layer": layer, f"{place}_drop_pp": drop(line)}
            found["layers"] |= limits(line, "drop_pp", prefix=f"{place}_")
    if len(singles) > 1:
        found |= about_heads(list(singles.values()), images)
    elif len(layers) < 2 and rows:
        found["masks"] = other_masks(rows, images)
    return found


def about_heads(rows: list[Line], images: int) -> dict[str, Numbers]:
    rises = [number(row["nll"]) for row in rows]
    order = sorted((row for row in rows if row["nll_rise"]), key=lambda row: -number(row["nll"]))
    costly: Numbers = {"shown": min(5, len(order)), "heads": len(rises)}
    for place, line in enumerate(order[:5], start=1):
        costly |= {f"{place}_nll_rise": number(line["nll_rise"]), f"{place}_drop_pp": drop(line)}
        costly |= limits(line, "nll_rise", prefix=f"{place}_") | (
            {f"{place}_q": number(line["bh_q"])} if line["bh_q"] else {}
        )
    if len(order) < len(rows):
        costly["undefined"] = len(rows) - len(order)
    signs = {"above": "nll_rise_low", "below": "nll_rise_high"}
    sure = {
        name: sum((number(row[column]) > 0) if name == "above" else (number(row[column]) < 0) for row in rows)
        for name, column in signs.items()
    }
    square = stats.norm.ppf(0.975) ** 2
    reach = 100 * square / (images + square)
    small = sum(number(row["drop_low_pp"]) >= -1 and number(row["drop_high_pp"]) <= 1 for row in rows)
    useless: Numbers = {"heads": len(rows)}
    useless |= {"images": images, "narrowest": reach} if reach > 1 else {"small": small} if small else {}
    if order:
        least = min((row for row in rows if row["nll_rise"]), key=lambda row: number(row["nll_rise"]))
        useless |= {"nll_rise": number(least["nll_rise"])} | limits(least, "nll_rise")
    found = {"heads_tested": tested(rows, images, power_told=True) | sure | {"heads": len(rows)}, "useless": useless}
    return found | ({"heads": costly} if order else {})


def other_masks(rows: list[Line], images: int) -> Numbers:
    found: Numbers = {"masks": len(rows)} if len(rows) > 1 else {}
    shown = sorted(rows, key=lambda row: -drop(row))[:3]
    for place, line in enumerate(shown, start=1):
        found |= {f"{place}_drop_pp": drop(line), f"{place}_heads": int(line["heads_masked"])}
        found |= limits(line, "drop_pp", prefix=f"{place}_")
        test = "bh_q" if line["bh_q"] else "mcnemar_p"
        found[f"{place}_{test}"] = number(line[test])
    unsure = any(not line["bh_q"] or number(line["bh_q"]) >= 0.05 for line in shown)
    return found | (resolved(rows, images) if unsure else {})


# -- sets --


def random_heads(files: Files) -> Numbers | None:
    drops: dict[int, list[float]] = {}
    for mask in files.heads:
        if files.curve[mask].startswith("random_seed_") and files.heads[mask]:
            drops.setdefault(len(files.heads[mask]), []).append(files.mean(mask, files.kind, "drop_pp"))
    several = {count: own for count, own in drops.items() if len(own) > 1}
    if not several or not lines(files.folder, "curves.csv"):
        return None
    total = sum(files.per_layer)
    count = min(sorted(several), key=lambda count: abs(count - total / 2))
    own = np.array(several[count])
    found: Numbers = {"removed": count, "heads": total, "drop_pp": own.mean(), "orders": len(own)}
    if len(own) < 10:
        return found | {"drop_low_pp": own.min(), "drop_high_pp": own.max()}
    low, high = stats.t.interval(0.95, len(own) - 1, own.mean(), own.std(ddof=1) * math.sqrt(1 + 1 / len(own)))
    top1 = 100 * int(files.baseline["top1_count"]) / files.images
    return found | {"drop_low_pp": max(low, top1 - 100), "drop_high_pp": min(high, top1)}


def indices(files: Files) -> Numbers | None:
    rows = [line for line in lines(files.folder, "index_null.csv") if line["quantity"] == "nll_rise"]
    rows = [line for line in rows if line["ablation"] == files.kind and line["draws"] != "0"]
    if not rows:
        return None
    count = [int(line["draws"]) for line in rows]
    found: Numbers = {"draws": min(count), "indices": len(rows)}
    if min(count) < 99:
        return found | {"needed": 99}
    first: dict[
        frozenset[tuple[int, int]], str
    ] = {}  # masks of the same heads count with the first of them: their rounding may differ
    for line in files.masks:
        if line["ablation"] == files.kind:
            first.setdefault(frozenset(files.heads[line["mask"]]), line["mask"])
    drawn = [mask for mask in files.heads if mask.startswith("one-per-layer:")]
    draws, values = (
        [files.mean(first[frozenset(files.heads[mask])], files.kind, "nll_rise") for mask in masks]
        for masks in (drawn, [line["mask"] for line in rows])
    )
    p = [two_sided(value, draws) for value in values]
    q = multipletests(p, method="fdr_bh")[1]
    best = min(range(len(p)), key=lambda place: (p[place], -values[place]))
    low, high = np.quantile(draws, [0.025, 0.975])
    found |= {"p": p[best], "bh_q": q[best], "value": values[best], "draws_mean": float(np.mean(draws))}
    found |= {"draws_low": low, "draws_high": high, "least_q": min(1, len(p) * 2 / (len(draws) + 1))}
    real = int((q < 0.05).sum())
    return found | ({"significant": real, "number": real} if real else {})


def two_sided(value: float, draws: list[float]) -> float:
    """The share of all that are as far from the middle rank as the value."""
    every = np.array([*draws, value])
    ranks = np.array([(every < one).sum() + ((every == one).sum() + 1) / 2 for one in every])
    far = np.abs(ranks - (len(every) + 1) / 2)
    return float((far >= far[-1]).mean())


def sums_of_heads(files: Files) -> dict[str, dict[tuple[int, int], float]]:
    """By ablation the NLL rises of single heads, where all were named by `each:head`."""
    found: dict[str, dict[tuple[int, int], float]] = {}
    for line in files.masks:
        if "each:head" in line["test_family"].split(" :: ") or (line["draw"] != "0" and line["heads_masked"] == "1"):
            kind, mask = line["ablation"], line["mask"]
            found.setdefault(kind, {})[min(files.heads[mask])] = files.mean(mask, kind, "nll_rise")
    return found


def replaced(files: Files) -> dict[str, Numbers]:
    """`linear` and `ablations`; the limits are those of the table, whose own tests recompute them."""
    rises = sums_of_heads(files)
    table = {
        (line["ablation_a"], line["ablation_b"]): line
        for line in lines(files.folder, "ablations.csv")
        if (line["test_family"], line["quantity"]) == ("each:head", "nll_rise")
    }
    found: dict[str, Numbers] = {}
    if line := table.get(("zero", "linear")):
        zero, linear = (sum(rises[kind].values()) for kind in ("zero", "linear"))
        one: Numbers = {"masks": len(rises["zero"]), "sum_a": zero, "sum_b": linear, "b_minus_a": linear - zero}
        for column in ("sum_a", "sum_b", "b_minus_a"):
            one |= limits(line, column)
        if "mean" in rises:
            side, own = next(
                (side, row) for row in table.values() for side in "ab" if row[f"ablation_{side}"] == "mean"
            )
            one |= {"mean": sum(rises["mean"].values())} | limits(own, f"sum_{side}", "mean")
        worst = max(
            (row for row in files.sets("linear") if row["heads_masked"] == "1"),
            key=lambda row: number(row["nll_rise"]),
        )
        one |= {"worst": number(worst["nll_rise"])} | limits(worst, "nll_rise", "worst")
        found["linear"] = one | ({"kept": linear / zero} if zero > 0 and 0 <= linear <= zero else {})
    agree: Numbers = {}
    for place, ((first, second), line) in enumerate(table.items(), start=1):
        heads = list(rises[first])
        pairs = [[rises[kind][head] for head in heads] for kind in (first, second)]
        agree |= {f"{place}_spearman": stats.spearmanr(*pairs).statistic} | limits(line, "spearman", prefix=f"{place}_")
    return found | ({"ablations": agree} if agree else {})


def removable(files: Files) -> Numbers | None:
    """The area under straight lines through the points of each order, and how many heads can go."""
    orders: dict[str, list[Line]] = {}
    kinds = {line["ablation"] for line in files.masks}
    kind = "linear" if "linear" in kinds else files.kind
    for line in files.masks:
        if files.curve[line["mask"]].startswith("grow_") and line["ablation"] == kind and line["heads_masked"] != "0":
            orders.setdefault(files.curve[line["mask"]], []).append(line)
    orders = {
        name: sorted(own, key=lambda line: int(line["heads_masked"])) for name, own in orders.items() if len(own) > 1
    }
    if not orders or not lines(files.folder, "orders.csv"):
        return None
    areas = {}
    for name, own in orders.items():
        x = [0, *(int(line["heads_masked"]) for line in own)]
        y = [int(line["top1_count"]) / files.images for line in (files.baseline, *own)]
        areas[name] = float(np.trapezoid(y, x) / x[-1])
    best = max(areas, key=lambda name: areas[name])
    found: Numbers = {
        "orders": len(orders),
        "area": areas[best],
        "counts": len(orders[best]),
        "heads": sum(files.per_layer),
    }
    table = {row["order"]: row for row in lines(files.folder, "orders.csv") if row["ablation"] == kind}
    line = table[best]
    found |= limits(line, "area")
    if line["minus_random"]:
        found |= {"minus_random": number(line["minus_random"])} | limits(line, "minus_random")
    worse = [table[name] for name in orders if number(table[name]["minus_random_high"]) < 0]
    for place, row in enumerate(sorted(worse, key=lambda row: -number(row["minus_random"])), start=1):
        prefix = f"worse_{place}_"
        found |= {f"{prefix}minus_random": number(row["minus_random"])} | limits(row, "minus_random", prefix=prefix)
    for name, column in (("removable_1pp", "drop_pp"), ("surely", "drop_high_pp")):
        counts = [0]
        for point in orders[best]:
            if number(point[column]) > 1 + 1e-9:
                break
            counts.append(int(point["heads_masked"]))
        found[name] = counts[-1]
    if not found["removable_1pp"]:
        del found["surely"]
    for point in orders[best]:
        if int(point["heads_masked"]) == found["removable_1pp"]:
            found |= {"drop_pp": drop(point)} | limits(point, "drop_pp")
    return found


def interactions(files: Files) -> Numbers | None:
    rows = [
        line
        for line in lines(files.folder, "interactions.csv")
        if (line["kind"], line["ablation"], line["quantity"]) == ("pairwise", files.kind, "nll_rise") and line["bh_q"]
    ]
    if not rows:
        return None
    q = multipletests([number(line["p"]) for line in rows], method="fdr_bh")[1]
    real = [line for line, own in zip(rows, q, strict=True) if own < 0.05]
    if not real:
        return {"pairs": len(rows), "q": float(min(q))}
    parts = {
        line["mask"]: [files.mean(line[name], files.kind, "nll_rise") for name in ("mask", "mask_a", "mask_b")]
        for line in real
    }
    between = {mask: both - first - second for mask, (both, first, second) in parts.items()}
    largest = max(between, key=lambda mask: abs(between[mask]))
    both, first, second = parts[largest]
    more = sum(value > 0 for value in between.values())
    (line,) = (line for line in real if line["mask"] == largest)
    found: Numbers = {"pairs": len(rows), "more": more, "less": len(real) - more, "both": both, "sum": first + second}
    return found | {"interaction": between[largest]} | limits(line, "interaction")


def shapley(files: Files) -> Numbers | None:
    """Of layers by all orders; of heads by the means of the steps along random orders."""
    rows = [
        line
        for line in lines(files.folder, "shapley.csv")
        if (line["ablation"], line["quantity"]) == (files.kind, "nll_rise")
    ]
    players = "heads" if any(line["players"] == "heads" for line in rows) else "layers"
    rows = sorted((line for line in rows if line["players"] == players), key=lambda line: -number(line["value"]))
    if not rows:
        return None
    everything = {(layer, head) for layer, count in enumerate(files.per_layer) for head in range(count)}
    masks = [line["mask"] for line in files.masks if line["ablation"] == files.kind]
    first = next(mask for mask in masks if files.heads[mask] == everything)  # of one set under two names the first
    found: Numbers = {"count": len(rows), "total": files.mean(first, files.kind, "nll_rise")}
    for place, line in enumerate(rows[:5], start=1):
        found |= {f"{place}_value": number(line["value"])} | limits(line, "value", prefix=f"{place}_")
        found |= {f"{place}_layer": int(line["layer"])} if players == "layers" else {}
    found["unclear"] = sum(number(line["value_low"]) <= 0 <= number(line["value_high"]) for line in rows)
    return found


# -- what heads are like --


def ends(folder: Path, column: str) -> tuple[list[Line], list[list[Line]]] | None:
    rows = [line for line in lines(folder, "heads.csv") if line["mask"] == "none" and line.get(column)]
    if not rows:
        return None
    layers = sorted({int(line["layer"]) for line in rows})
    return rows, [[line for line in rows if int(line["layer"]) == layer] for layer in (layers[0], layers[-1])]


def described(folder: Path) -> dict[str, Numbers]:
    found: dict[str, Numbers] = {}
    for key, column, more in (("distance", "attention_distance_px", True), ("entropy", "entropy_ratio", False)):
        if (of_run := ends(folder, column)) is None:
            continue
        rows, two = of_run
        one: Numbers = {}
        for end, own in zip(("first", "last"), two, strict=True):
            values = [number(line[column]) for line in own]
            one |= {f"{end}_mean": float(np.mean(values)), f"{end}_least": min(values), f"{end}_most": max(values)}
            one[f"{end}_layer"] = int(own[0]["layer"])
            if more:
                one |= {
                    f"{end}_heads": len(own),
                    f"{end}_ratio": float(np.mean([number(line["attention_distance_ratio"]) for line in own])),
                }
        every = [number(line[column]) for line in rows]
        if more:
            one |= {"near": min(every), "far": max(every), "error": max(number(line[f"{column}_se"]) for line in rows)}
        found[key] = one if more else one | {"least": min(every)}
    return found


def frequencies(folder: Path) -> Numbers | None:
    rows = [line for line in lines(folder, "spectrum.csv") if (line["mask"], line["profile"]) == ("none", "diagonal")]
    delta: dict[tuple[str, int], float] = {}
    for line in sorted(rows, key=lambda line: number(line["frequency"])):
        delta[line["series"], int(line["layer"])] = number(line["delta_log_amplitude"])  # the highest comes last
    change = {
        layer: after - delta["stream_before", layer]
        for (series, layer), after in delta.items()
        if series == "stream_after"
    }
    change = {layer: value for layer, value in change.items() if math.isfinite(value)}
    if not change:
        return None
    order = sorted(change, key=lambda layer: change[layer])
    found: Numbers = {"lower": sum(value < 0 for value in change.values()), "layers": len(change)}
    found |= {"least_layer": order[0], "least": change[order[0]]}
    return found | {"most_layer": order[-1], "most": change[order[-1]]}


def similarity(folder: Path) -> Numbers | None:
    if not (folder / "similarity.npz").is_file():
        return None
    arrays = np.load(folder / "similarity.npz")
    measure = next(name for name in ("cka_unbiased", "cka", "svcca", "pwcca", "cca", "procrustes") if name in arrays)
    matrix, layer = arrays[measure], arrays["layer"]
    pairs = {(i, j): (matrix[i, j] + matrix[j, i]) / 2 for i, j in combinations(range(len(layer)), 2)}
    pairs = {pair: value for pair, value in pairs.items() if math.isfinite(value)}
    within = [pair for pair in pairs if layer[pair[0]] == layer[pair[1]]]
    nearest = max(pairs, key=lambda pair: pairs[pair])
    found: Numbers = {"nearest": pairs[nearest]}
    if within:
        found |= {"mean": np.mean([pairs[pair] for pair in within]), "pairs": len(within)}
        if f"{measure}_floor" in arrays:
            found["floor"] = np.mean([arrays[f"{measure}_floor"][pair] for pair in within])
    if f"{measure}_low" in arrays and math.isfinite(arrays[f"{measure}_low"][nearest]):
        found |= {f"nearest_{end}": float(arrays[f"{measure}_{end}"][nearest]) for end in ("low", "high")}
    return found


def scores(files: Files) -> Numbers | None:
    """Rank correlations of every score with the rises of single heads; limits and ceilings are the table's."""
    table = [
        line for line in lines(files.folder, "importance.csv") if (line["target"], line["scope"]) == ("nll_rise", "all")
    ]
    if not table:
        return None
    known: dict[str, dict[tuple[int, int], float]] = {"depth": {}}
    for name in ("scores.csv", "heads.csv"):
        for line in lines(files.folder, name):
            head = int(line["layer"]), int(line["head"])
            known["depth"][head] = head[0]
            for column in (
                line.keys() - {"mask", "layer", "head", "images"} if line.get("mask", "none") == "none" else ()
            ):
                if not column.endswith("_se") and line[column] and math.isfinite(float(line[column])):
                    known.setdefault(column, {})[head] = float(line[column])
    found: Numbers = {}
    kinds = sorted(dict.fromkeys(line["ablation"] for line in table), key=lambda kind: kind != files.kind)
    for place, kind in enumerate(kinds, start=1):
        rises: dict[tuple[int, int], float] = {}
        for line in files.masks:  # a head that several masks name counts with the first
            if line["ablation"] == kind and line["heads_masked"] == "1":
                rises.setdefault(min(files.heads[line["mask"]]), files.mean(line["mask"], kind, "nll_rise"))
        correlations = {}
        for name, values in known.items():
            both = sorted(values.keys() & rises.keys())
            if len(both) > 2 and len({values[head] for head in both}) > 1:
                correlations[name] = stats.spearmanr(
                    [values[head] for head in both], [rises[head] for head in both]
                ).statistic
        lines_of = {line["score"]: line for line in table if line["ablation"] == kind}
        depth = correlations.pop("depth")
        best = max(correlations, key=lambda name: (abs(correlations[name]), -list(lines_of).index(name)))
        own: Numbers = {"spearman": correlations[best], "scores": len(correlations), "depth": depth}
        if lines_of[best]["ceiling"]:
            own["ceiling"] = number(lines_of[best]["ceiling"])
        own |= limits(lines_of[best], "spearman") | limits(lines_of["depth"], "spearman", "depth")
        found |= {f"{place}_{name}": value for name, value in own.items()}
    return found


def expected(folder: Path) -> dict[str, dict[str, float]]:
    """The numbers of every sentence that the files allow."""
    files = Files(folder)
    optional = {
        "random": random_heads(files),
        "index": indices(files),
        "removable": removable(files),
        "interactions": interactions(files),
        "shapley": shapley(files),
        "frequencies": frequencies(folder),
        "similarity": similarity(folder),
        "scores": scores(files),
    }
    found = about_masks(files) | replaced(files) | described(folder)
    found |= {key: numbers for key, numbers in optional.items() if numbers is not None}
    if files.draws > 1:
        for key in found.keys() & {"layers", "heads", "masks", "random", "removable", "interactions", "shapley"}:
            found[key]["ablation_draws"] = files.draws
    return found
