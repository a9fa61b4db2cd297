"""Three ways to modify a module in place: wrap a method, override a parameter, add a mixin.

The module object stays the same and its parameters keep their names, so state dicts do not change. Modifications nest:
the last one is the outermost.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Function = Callable[..., Any]


def wrap_forward(module: nn.Module, wrap: Callable[[Function], Function], name: str = "forward") -> None:
    """Replace the method `name` of a module by `wrap(method)`."""
    setattr(module, name, wrap(getattr(module, name)))


def override_parameter(module: nn.Module, name: str, compute: Callable[[Any, str], Tensor | None]) -> None:
    """Let the attribute `name` of a module be `compute(module, name)` whenever it is read.

    `module.named_parameters()` still lists the parameter of this name. A DTensor is returned as it is: FSDP2
    reads DTensors by attribute, and nothing computes with them.
    """

    def read(module: nn.Module) -> Tensor | None:
        parameter = module._parameters[name]
        return parameter if hasattr(parameter, "full_tensor") else compute(module, name)

    base = type(module)
    module.__class__ = type(base.__name__, (base,), {name: property(read)})


def add_mixin(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Make a module an instance of `mixin` too, whose methods come before its own."""
    base = type(module)
    if not issubclass(base, mixin):
        module.__class__ = type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})
