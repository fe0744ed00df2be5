"""All files of a dataset must hold the same columns: `datasets` fills what one of them lacks with None, silently."""

from collections.abc import Sequence

import datasets
import pyarrow as pa

from headprobe.data.footer import Footer
from headprobe.data.source import Request
from headprobe.errors import RunError

NUMBERS, TEXT = "numbers", "text"


def check_one_schema(footers: Sequence[Footer], request: Request) -> None:
    """Check that every file holds images and labels of the same kind and the same class names as the first one.

    Files without rows may hold what they like.

    Raises:
        RunError: One does not; the message names the file and what it has.
    """
    filled = [footer for footer in footers if footer.rows]
    for column in (request.image_column, request.label_column) if filled else ():
        first = _content(filled[0], column)
        for footer in filled[1:]:
            difference = _difference(_content(footer, column), first, column == request.label_column)
            if difference:
                raise RunError(
                    f"{footer.name} differs from {filled[0].name} in the column {column}: replace it, or give "
                    f"--data.path files that agree, got {difference}"
                )


def _content(footer: Footer, column: str) -> list[str]:
    """Say what a column holds, and its class names; 32 or 64 bits, or bytes in a struct or not, are no difference."""
    places = footer.schema.get_all_field_indices(column)
    if len(places) != 1:
        return ["no such column" if not places else f"{len(places)} columns of that name"]
    kind = footer.schema.field(places[0]).type
    if pa.types.is_integer(kind):
        return [NUMBERS, *_class_names(footer, column)]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind):
        return ["bytes"]
    return [TEXT if pa.types.is_string(kind) or pa.types.is_large_string(kind) else str(kind)]


def _difference(here: list[str], first: list[str], labels: bool) -> str:
    if here[0] != first[0]:
        # Labels as text are read as numbers where the first file has numbers; text that is no label ends its unit.
        return "" if labels and {here[0], first[0]} == {NUMBERS, TEXT} else f"{here[0]} instead of {first[0]}"
    if len(here) != len(first):
        return f"{len(here) - 1} class names instead of {len(first) - 1}"
    others = (place for place, (name, wanted) in enumerate(zip(here, first, strict=True)) if name != wanted)
    place = next(others, 0)
    return f"{here[place]!r} as class {place - 1} instead of {first[place]!r}" if place else ""


def _class_names(footer: Footer, column: str) -> list[str]:
    try:
        feature = datasets.Features.from_arrow_schema(footer.schema).get(column)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{footer.name} describes its columns in no readable way: {reason}. Replace it") from None
    return list(feature.names or ()) if isinstance(feature, datasets.ClassLabel) else []
