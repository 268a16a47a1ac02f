"""Attention of short calibration rows by whole products, where ar-kernels has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ar_kernels.native import attending

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor


class ShortRows(TorchFunctionMode):
    """While it lasts, causal attention of short rows goes to `ar_kernels.native.attending`.

    Whatever it does not serve (masks, other types, long rows) stays torch's.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],  # noqa: ARG002 - torch's signature
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # whatever the function returns
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            made = _attention(*args, **kwargs)
            if made is not None:
                return made
        return func(*args, **kwargs)


def _attention(  # noqa: PLR0913 - torch's signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,  # noqa: FBT001, FBT002
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    plain = is_causal and attn_mask is None and not dropout_p
    if not plain or not attending.serves(query, key, value):
        return None
    if not enable_gqa and query.shape[1] != key.shape[1]:
        return None  # torch says what is wrong
    return attending.attention(query, key, value, scale or query.shape[-1] ** -0.5)
