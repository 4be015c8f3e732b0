"""YAML without its surprises: text, plain numbers, true and false, lists and mappings; all else is
an error."""

from __future__ import annotations

import math
import re
import reprlib
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_PLAIN = {
    "bool": re.compile(r"(?i:true|false)"),
    # Not 012, which is ten to YAML 1.1, nor 1:30, which is ninety, nor 0x1F, nor 1_000.
    "int": re.compile(r"[-+]?(0|[1-9][0-9]*)"),
    "float": re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"),
    "str": re.compile(r"(?s:.*)"),
}


class StrictYamlError(ValueError):
    """Text that is no YAML, or YAML that says something else than it seems to; the message names
    the place."""


class _Loader(yaml.SafeLoader):
    """Builds values with the place in hand, so that errors can name it; an alias is refused."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            # A few of them nested would stand for more values than memory holds.
            raise yaml.composer.ComposerError(
                problem="an alias (*name) is not accepted, write the value out",
                problem_mark=self.peek_event().start_mark,
            )
        return super().compose_node(parent, index)

    def value(self, node: yaml.Node, place: str) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(item, f"{place}[{index}]") for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, kind, place or "top level")
        raise StrictYamlError(
            f"{place or 'top level'}: the tag {node.tag} is not accepted; remove it"
        )

    def _mapping(self, node: yaml.MappingNode, place: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, item in node.value:
            line = key.start_mark.line + 1
            where = place or "top level"
            if not isinstance(key, yaml.ScalarNode):
                raise StrictYamlError(
                    f"{where}: the key in line {line} is a list or mapping; expected a name"
                )
            if key.tag != _TAG + "str":
                kind = key.tag.removeprefix(_TAG)
                raise StrictYamlError(
                    f'{where}: YAML reads the key {key.value} as {kind}; quote it: "{key.value}"'
                )
            if key.value in found:
                raise StrictYamlError(
                    f"{where}: the key {key.value} stands again in line {line}; remove one of"
                    " the two"
                )
            found[key.value] = self.value(item, f"{place}.{key.value}" if place else key.value)
        return found

    def _scalar(self, node: yaml.ScalarNode, kind: str, place: str) -> bool | int | float | str:
        text = node.value
        quoted = f'quote it if text is meant: "{text}"'
        if kind == "null":
            raise StrictYamlError(
                f"{place}: YAML reads {text or 'nothing'} as null; write a value, or {quoted}"
            )
        if kind != "str" and node.tag != self.resolve(yaml.ScalarNode, text, (True, False)):
            raise StrictYamlError(f"{place}: the tag {node.tag} is not accepted; remove it")
        if kind not in _PLAIN:
            raise StrictYamlError(f"{place}: YAML reads {text} as {kind}; {quoted}")
        try:
            value = self.construct_object(node)
        except ValueError:  # "0x_", and more digits than Python converts
            raise StrictYamlError(
                f"{place}: YAML takes {reprlib.repr(text)} for a number, which it is not or too"
                " long a one; quote it"
            ) from None
        if isinstance(value, float) and not math.isfinite(value):
            raise StrictYamlError(
                f"{place}: YAML reads {text} as {value}; write a finite number, or {quoted}"
            )
        if not _PLAIN[kind].fullmatch(text):
            meant = str(value).lower()
            raise StrictYamlError(
                f"{place}: YAML reads {text} as the {kind} {value}; write {meant}, or {quoted}"
            )
        return value


def load_yaml(text: str) -> Any:
    """The one document in `text`: None if there is nothing in it.

    Raises:
        StrictYamlError: a syntax error (with its line); a key twice in a mapping; an alias or tag;
            null; a key or value that YAML 1.1 reads as something else than it looks like, such as
            ``no``, ``012`` or a date.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else loader.value(node, "")
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise StrictYamlError(
            f"{where}not valid YAML: {error.problem or error.context}; correct that line"
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise StrictYamlError(
            f"line {line}: not valid YAML: {error.reason}; remove that character"
        ) from None
    except RecursionError:
        raise StrictYamlError("top level: nested too deeply; expected a few levels") from None
