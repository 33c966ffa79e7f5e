"""Names for annotating array shapes: ``Float[Tensor, "B T D"]``, ``UInt8[np.ndarray, "H W 3"]``.

They come from jaxtyping where it is installed (the tests check them at run time). jaxtyping is no dependency:
without it, an annotation means its array type alone. Letters are those of the tensor suffixes (``x_BTD``).

This module is below every ring and imports nothing of the package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Bool", "Complex", "Float", "Int", "Num", "Shaped", "UInt8"]

if TYPE_CHECKING:
    from jaxtyping import Bool, Complex, Float, Int, Num, Shaped, UInt8
else:
    try:
        from jaxtyping import Bool, Complex, Float, Int, Num, Shaped, UInt8
    except ImportError:

        class _ArrayType:
            """Stands in for jaxtyping: ``_ArrayType[Tensor, "B T"]`` is ``Tensor``."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Bool = Complex = Float = Int = Num = Shaped = UInt8 = _ArrayType
