"""Our code in place of a method of Megatron's classes, for as long as a model needs it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

_CALLED: WeakKeyDictionary[Any, Callable[[], Callable[..., Any] | None]] = WeakKeyDictionary()
"""By our replacement of a method: a function that returns what it calls, or None if it is over."""


def go_around_method(owner: Any, name: str, ours: Callable[..., Any]) -> Callable[[], None]:
    """Call ``ours`` instead of a class's method, with that method as its first argument.

    ``ours`` is a bound method, held weakly: a model that is dropped without ``detach`` can be freed.

    Returns:
        A function that undoes this. If other code has replaced the method in the meantime, ours stays and
        only calls the method.
    """
    method = _without_what_is_over(getattr(owner, name))

    @functools.wraps(method)
    def around(*args: Any, **named: Any) -> Any:
        called = _CALLED[around]()
        return method(*args, **named) if called is None else called(method, *args, **named)

    def undo() -> None:
        _CALLED[around] = lambda: None
        setattr(owner, name, _without_what_is_over(getattr(owner, name)))

    _CALLED[around] = WeakMethod(ours)
    setattr(owner, name, around)
    return undo


def _without_what_is_over(method: Any) -> Any:
    while method in _CALLED and _CALLED[method]() is None:
        method = method.__wrapped__
    return method
