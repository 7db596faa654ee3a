"""A check of shapes, for arguments that PyTorch would otherwise broadcast in silence."""

from collections.abc import Sequence

from torch import Tensor


def check_shape(expected: Sequence[int | None], /, **tensors: Tensor) -> None:
    """Refuse tensors of another shape than the expected one; None stands for any size.

    It reads shapes alone: nothing waits for the device.

    Args:
        expected: The shape.
        **tensors: Tensors by the names of the arguments that they are.

    Raises:
        ValueError: begins with the name, and gives both shapes.

    Example:
        >>> import torch
        >>> check_shape((2, None), logps=torch.zeros(2, 3))
        >>> check_shape((2,), advantages=torch.zeros(2, 1))
        Traceback (most recent call last):
        ValueError: advantages has shape (2, 1); it has to be (2)
    """
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        fits = len(shape) == len(expected) and all(e in (None, s) for e, s in zip(expected, shape, strict=True))
        if not fits:
            sizes = ", ".join("any" if size is None else str(size) for size in expected)
            raise ValueError(f"{name} has shape {shape}; it has to be ({sizes})")
