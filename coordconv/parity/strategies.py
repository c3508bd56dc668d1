"""A hypothesis strategy for what :func:`coordconv.parity.generate` draws; needs hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from coordconv.parity.cases import Case, layer_case


def cases(*, exact: bool | None = None, dtype: str = "float32") -> st.SearchStrategy[Case]:
    """Layers over every option that a backend may have.

    Args:
        exact: whether the data are small integers; None for either.
        dtype: what they are run in.

    Returns:
        A strategy whose examples are what ``coordconv parity`` runs, and shrink to few options.

    Example:
        >>> from hypothesis import find
        >>> case = find(cases(exact=True), lambda case: case.network.layers[0].geometry.rank == 2)
        >>> case.draw()[1].ndim
        4
    """
    return st.builds(
        layer_case,
        st.randoms(use_true_random=False),
        st.integers(0, 2**32 - 1),
        st.booleans() if exact is None else st.just(exact),
        st.just(dtype),
    )
