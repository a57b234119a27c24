"""Commands that start at once.

Typer 0.29 imports pydantic (75 ms of a 100 ms start) to convert the value of any parameter. The
commands that must start at once take only text and switches, which need no conversion; all of
them are built when they are called, because building them together takes another 20 ms.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from kexue.core.console.output import note

__all__ = ["SETTINGS", "VERBS", "Group", "PlainCommand", "Verb", "built", "verb"]

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}


class Verb(NamedTuple):
    """A command that is built when it is called.

    Args:
        name: What the user types.
        help: Its help; the first sentence stands in the list of commands.
        build: Builds the command, given the arguments that follow its name.
    """

    name: str
    help: str
    build: Callable[[Sequence[str]], TyperCommand]


VERBS: dict[str, Verb] = {}
"""The commands by name, in the order in which they are listed."""


def verb(name: str, *, plain: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command.

    Args:
        name: What the user types.
        plain: Whether its parameters are only text and switches.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        text = function.__doc__ or ""
        cls = PlainCommand if plain else TyperCommand
        VERBS[name] = Verb(name, text, lambda _: built(function, name, text, cls))
        return function

    return register


def built(
    function: Callable[..., None], name: str, text: str, cls: type[TyperCommand] = TyperCommand
) -> Any:
    """Return a function as a Typer command; unless it is plain, garbage is collected from here."""
    if cls is not PlainCommand:
        gc.enable()
    single = typer.Typer(
        rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False
    )
    single.command(name, help=text, cls=cls, context_settings=SETTINGS)(function)
    return typer.main.get_command(single)


class _PlainOption(TyperOption):
    def process_value(self, ctx: Any, value: Any) -> Any:
        if self.required and value is None:
            return super().process_value(ctx, value)
        return value if self.callback is None else self.callback(ctx, self, value)


class _PlainArgument(TyperArgument):
    def process_value(self, ctx: Any, value: Any) -> Any:
        return super().process_value(ctx, value) if self.required and value is None else value


def _plain(parameters: Sequence[Any]) -> list[Any]:
    for parameter in parameters:
        if type(parameter) is TyperOption:
            parameter.__class__ = _PlainOption
        elif type(parameter) is TyperArgument:
            parameter.__class__ = _PlainArgument
    return list(parameters)


class PlainCommand(TyperCommand):
    """A command whose parameters are text and switches."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, which convert nothing."""
        return _plain(super().get_params(ctx))


class Group(TyperGroup):
    """All commands, of which only the one that is called is built."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands = {name: TyperCommand(name, help=found.help) for name, found in VERBS.items()}

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, which convert nothing."""
        return _plain(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C ends it with what it has to say."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            note(str(error) or "Interrupted.")
            raise typer.Exit(130) from error

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return name, command and remaining arguments; build the command."""
        if args and args[0] in VERBS:
            return args[0], VERBS[args[0]].build(args[1:]), args[1:]
        return super().resolve_command(ctx, args)
