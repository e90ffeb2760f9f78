"""What a kernel's result must be."""

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Same dtype, shape and bits; NaN equals NaN of the same bits."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), (
        f"{found.dtype} {list(found.shape)}, expected {expected.dtype} {list(expected.shape)}"
    )
    wrong = (as_bits(found) != as_bits(expected)).nonzero().tolist()
    if wrong:
        at = tuple(wrong[0])
        raise AssertionError(f"first of {len(wrong)} wrong at {list(at)}: {found[at]}, expected {expected[at]}")


def as_bits(tensor: Tensor) -> Tensor:
    """The same elements as integers."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_accurate(found: Tensor, exact: Tensor, plain: Sequence[Tensor]) -> None:
    """Error at most twice that of plain torch and one rounding step of the largest output; infinities the same.

    Args:
        found: the kernel's result, any shape, any float dtype.
        exact: the same, computed in float64.
        plain: the same, computed by plain torch in that dtype, in several orders of summation: one alone may be lucky,
            most of all with one query. Its error is the worst of them.
    """
    assert found.shape == exact.shape, f"{list(found.shape)}, expected {list(exact.shape)}"
    assert exact.dtype == torch.float64 and all(p.dtype == found.dtype for p in plain)
    finite = exact.isfinite()
    assert_same(found[~finite].double(), exact[~finite])
    if not finite.any():
        return
    plain_error = torch.stack([(p.double() - exact)[finite].abs().max() for p in plain]).max()
    bound = 2 * (plain_error + torch.finfo(found.dtype).eps * exact[finite].abs().max())
    errors = (found.double() - exact).abs().where(finite, 0.0)
    worst = [int(i) for i in torch.unravel_index(errors.nan_to_num(nan=torch.inf).argmax(), errors.shape)]
    error = errors[tuple(worst)]
    assert error <= bound, f"worst at {worst}: {error:.3e} > {bound:.3e}"
