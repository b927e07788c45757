"""The widths of a model's layers: what its method `narrowed` and its field `inner` have in common."""

from collections.abc import Mapping, Sequence

from sparsejax.masks import choose


def new_widths(names: Sequence[str], old: Sequence[int], widths: Mapping[str, int]) -> tuple[int, ...]:
    """The widths of the named layers in order: those in `widths`, and the old ones of the others.

    Raises:
      ValueError: if `widths` names another layer, listing the known ones.
    """
    for name in widths:
        choose("layer whose width can change:", name, names)
    return tuple(widths.get(name, width) for name, width in zip(names, old, strict=True))


def check_inner(inner: Sequence[int] | None, blocks: int) -> None:
    """Raises ValueError unless `inner` is None or has one positive width for every block."""
    if inner is not None and (len(inner) != blocks or min(inner) < 1):
        raise ValueError(
            f"inner must be one positive width for each of the {blocks} blocks, got {tuple(inner)}"
        )
