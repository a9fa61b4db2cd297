"""Three ways to modify a module in place: wrap a method, override a parameter, add a mixin.

The module object stays the same and its parameters keep their names, so state dicts do not change. Modifications nest:
the last one is the outermost. Modules of one class with the same modifications are of one class again, so that
`torch.compile` compiles layers once for all blocks.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn

Function = Callable[..., Any]
ComputeParameter = Callable[[Any, str], Tensor | None]


def wrap_forward(module: nn.Module, wrap: Callable[[Function], Function], name: str = "forward") -> None:
    """Replace the method `name` of a module by `wrap(method)`."""
    setattr(module, name, wrap(getattr(module, name)))


def override_parameter(module: nn.Module, name: str, compute: ComputeParameter) -> None:
    """Let the attribute `name` of a module be `compute(module, name)` whenever it is read.

    `module.named_parameters()` still lists the parameter of this name. A DTensor is returned as it is: FSDP2
    reads DTensors by attribute, and nothing computes with them.
    """
    base: Any = type(module)  # mypy takes no class of modules for a hashable argument
    module.__class__ = build_overriding_class(base, name, compute)


def add_mixin(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Make a module an instance of `mixin` too, whose methods come before its own."""
    classes: tuple[Any, Any] = (mixin, type(module))
    if not isinstance(module, mixin):
        module.__class__ = build_joint_class(*classes)


@cache
def build_overriding_class(base: type[nn.Module], name: str, compute: ComputeParameter) -> type[nn.Module]:
    """The class of modules of class `base` with such an attribute."""

    def read(module: nn.Module) -> Tensor | None:
        parameter = module._parameters[name]
        return parameter if hasattr(parameter, "full_tensor") else compute(module, name)

    return type(base.__name__, (base,), {name: property(read)})


@cache
def build_joint_class(mixin: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """The class of modules of class `base` with a mixin."""
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})
