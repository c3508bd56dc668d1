"""A Hypothesis strategy over the cases of :func:`coordconv.parity.generate`; needs Hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from coordconv.parity.cases import Case, sample_case


def cases(*, exact: bool | None = None, dtype: str = "float32") -> st.SearchStrategy[Case]:
    """Layers over every option that a backend may have, as ``coordconv parity`` runs them.

    Examples shrink to few options.

    Args:
        exact: whether the data are small integers; None for either.
        dtype: the type to compute in.

    Example:
        >>> from hypothesis import find
        >>> case = find(cases(exact=True), lambda case: case.network.layers[0].geometry.rank == 2)
        >>> case.data()[1].ndim
        4
    """
    return st.builds(
        sample_case,
        st.randoms(use_true_random=False),
        st.integers(0, 2**32 - 1),
        st.booleans() if exact is None else st.just(exact),
        st.just(dtype),
    )
