"""How recipes are checked: sections of keys, and sections that name a function and its options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator
from pydantic_core import PydanticCustomError

from treeify.errors import RecipeError, nearest
from treeify.registry import Registry

if TYPE_CHECKING:
    from typing_extensions import Self


# A number beyond these is a slip of the finger; the machine might hang over it.
Count = Annotated[int, Field(gt=0, le=10**9)]
Cpus = Annotated[int, Field(ge=0, le=1024)]
Rate = Annotated[float, Field(ge=0, le=1e4)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, and so are values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def keys(cls, _values: object) -> list[str]:
        """The keys this section may have."""
        return list(cls.model_fields)


def section_in(annotation: Any) -> type[Section] | None:
    """The section among the types that a field may have; None if there is none."""
    is_union = get_origin(annotation) in (Union, UnionType)
    for member in get_args(annotation) if is_union else (annotation,):
        if isinstance(member, type) and issubclass(member, Section):
            return member
    return None


class Named(Section):
    """A section with a function's name and, beside it, the options of that function.

    The name is a registered one, or `package.module:function` (or a class, whose instances are
    called) of your own.
    """

    model_config = ConfigDict(extra="allow")
    registry: ClassVar[Registry]

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The function's options, defaults included."""
        return dict(self.model_extra or {})

    @classmethod
    def keys(cls, values: object) -> list[str]:
        """`name` and the options of the function that `values` names."""
        name = values.get("name") if isinstance(values, dict) else None
        try:
            function = cls.registry.find(str(name))
        except RecipeError:
            return list(cls.model_fields)
        return [*cls.model_fields, *options_of(function).model_fields]

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        kind = cls.registry.kind
        if ":" in name:
            try:
                cls.registry.find(name)
            except RecipeError as error:
                raise PydanticCustomError(
                    "unknown_name", f"Input should name a {kind}: {error}"
                ) from error
        elif name not in cls.registry:
            names = nearest(name, cls.registry) or ", ".join(cls.registry)
            raise PydanticCustomError("unknown_name", f"Input should name a {kind}, e.g. {names}")
        return name

    @model_validator(mode="after")
    def _fit_function(self) -> Self:
        options = options_of(self.registry.find(self.name)).model_validate(self.model_extra)
        assert self.__pydantic_extra__ is not None
        self.__pydantic_extra__.update(options.model_dump())
        return self


def _default(value: Any) -> Any:
    # Checked as well, since a path becomes an absolute one.
    return Field(value, validate_default=True) if isinstance(value, str) else value


@functools.cache
def options_of(function: Callable[..., Any]) -> type[BaseModel]:
    """A pydantic model of a function's keyword-only parameters; of a class's, to be built."""
    signed = getattr(function, "__init__") if isinstance(function, type) else function  # noqa: B009
    hints = get_type_hints(signed, include_extras=True)
    fields: dict[str, Any] = {
        parameter.name: (
            hints.get(parameter.name, Any),
            ... if parameter.default is parameter.empty else _default(parameter.default),
        )
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    return create_model(function.__name__, __config__=Section.model_config, **fields)
