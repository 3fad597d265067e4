"""Values of protocols: the names of those by which encoders are compared, and all of them as tables show them, with units."""

import re

# Accuracies in percent, by their names in metrics.jsonl and result.json.
KNN_TOP1, LINEAR_TOP1 = "knn/top1", "linear/top1"
UNTRAINED_KNN_TOP1, PIXELS_KNN_TOP1 = "baseline/untrained_knn_top1", "baseline/pixels_knn_top1"
ACCURACIES = {
    KNN_TOP1: "kNN",
    LINEAR_TOP1: "linear",
}  # names in tables; configs of a sweep are ranked by the first measured
MAX_SHOWN = 12  # a protocol with more values is in the files only
_PERCENT = "top[15]|precision|recall|f1|roc_auc|ece|clean|unadapted|gain|agreement"
UNITS = {  # pattern of a whole name, such as knn/top1: unit; the first that fits, and none for what fits none
    rf".*/(.*_)?({_PERCENT})(_.*)?": "%",
    "duplicates/test_duplicated": "% of the test images",
    "duplicates/.*": "pairs",
    ".*/(images|broken|far)": "images",
    "health/rankme": "dimensions",
    "health/uniformity": "nats",
    "embed/features": "dimensions",
}


def unit(name: str) -> str:
    """The unit of a value by its full name, such as "%" of knn/top1; "" if it has none."""
    return next((unit for pattern, unit in UNITS.items() if re.fullmatch(pattern, name)), "")


def with_unit(name: str, value: float, interval: tuple[float, float] | None = None) -> str:
    """A value with its unit and its interval, percentages with two digits: "88.06 %  [84.72, 91.39]", "1 image"."""
    suffix = unit(name)
    percent, whole = suffix.startswith("%"), float(value).is_integer()
    text = f"{value:.2f}" if percent else f"{value:,.0f}" if whole else f"{value:.4g}"
    if value == 1 and not percent:
        suffix = suffix.removesuffix("s")
    text = f"{text} {suffix}".rstrip()
    return text if interval is None else f"{text}  [{interval[0]:.2f}, {interval[1]:.2f}]"
