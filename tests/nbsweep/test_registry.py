"""notebooks/registry.toml: what is accepted, what is refused, and what the refusal says."""

import pytest

from nbsweep.registry import RegistryError, find_notebook, load_registry

ENTRY = """
[[notebook]]
file = "{file}"
title = "Title"
tier = "core"
hardware = "none"
timeout_seconds = 10
minutes = 1
"""


@pytest.fixture
def folder(tmp_path):
    """Writes registry.toml with the given text and empty notebooks of the given names; returns its
    path."""

    def write(text, *notebooks):
        for name in notebooks:
            (tmp_path / name).touch()
        path = tmp_path / "registry.toml"
        path.write_text(text)
        return path

    return write


def entries(*files):
    return "".join(ENTRY.format(file=file) for file in files)


def test_notebooks_come_in_the_order_they_are_listed(folder):
    registry = load_registry(
        folder(entries("01_a.ipynb", "02_b.ipynb"), "02_b.ipynb", "01_a.ipynb")
    )
    assert [entry.file for entry in registry.notebook] == ["01_a.ipynb", "02_b.ipynb"]


def test_a_notebook_that_is_not_listed_is_refused_by_name(folder):
    with pytest.raises(RegistryError, match="does not list 02_b.ipynb.*Add"):
        load_registry(folder(entries("01_a.ipynb"), "01_a.ipynb", "02_b.ipynb"))


def test_a_listed_notebook_that_does_not_exist_is_refused_by_name(folder):
    with pytest.raises(RegistryError, match="lists 02_b.ipynb.*Restore"):
        load_registry(folder(entries("01_a.ipynb", "02_b.ipynb"), "01_a.ipynb"))


@pytest.mark.parametrize("files", [("02_b.ipynb", "01_a.ipynb"), ("01_a.ipynb", "01_b.ipynb")])
def test_numbers_out_of_order_or_twice_are_refused(folder, files):
    with pytest.raises(RegistryError, match="ascending"):
        load_registry(folder(entries(*files), *files))


def test_an_unknown_key_is_refused_and_the_known_ones_named(folder):
    with pytest.raises(
        RegistryError, match=r"notebook\[0\].timeout: unknown key; did you mean timeout_seconds"
    ):
        load_registry(folder(entries("01_a.ipynb") + "timeout = 3\n", "01_a.ipynb"))


def test_an_unknown_table_is_refused(folder):
    with pytest.raises(RegistryError, match="notebooks: unknown key; did you mean notebook"):
        load_registry(folder("[[notebooks]]\n"))


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        (("timeout_seconds = 10", "timeout_seconds = 0"), "timeout_seconds"),
        (("minutes = 1", ""), "minutes"),
        (("minutes = 1", "minutes = inf"), "minutes"),
        (('tier = "core"', 'tier = "other"'), "tier"),
    ],
)
def test_a_wrong_or_missing_value_is_refused_and_its_key_named(folder, wrong, names):
    with pytest.raises(RegistryError, match=rf"registry.toml: notebook\[0\].{names}: "):
        load_registry(folder(entries("01_a.ipynb").replace(*wrong), "01_a.ipynb"))


def test_broken_toml_is_refused_with_its_line(folder):
    with pytest.raises(RegistryError, match="not valid TOML.*line 1"):
        load_registry(folder("[[notebook\n"))


def test_a_missing_registry_is_refused(tmp_path):
    with pytest.raises(RegistryError, match="registry.toml: cannot be read .No such file"):
        load_registry(tmp_path / "registry.toml")


def test_a_file_of_another_folder_cannot_be_listed(folder):
    path = folder(entries("../a.ipynb"))
    (path.parents[1] / "a.ipynb").touch()
    with pytest.raises(RegistryError, match="lists ../a.ipynb, which does not exist beside it"):
        load_registry(path)


def test_a_notebook_is_found_with_or_without_the_leading_zero(folder):
    files = ("01_a.ipynb", "02_b.ipynb", "03_c.ipynb")
    path = folder(entries(*files), *files)
    registry = load_registry(path)
    for name in ("3", "03", "03_c.ipynb"):
        assert find_notebook(name, path.parent, registry).path == path.parent / "03_c.ipynb"


def test_a_number_that_does_not_exist_is_refused_and_those_that_do_are_named(folder):
    path = folder(entries("01_a.ipynb"), "01_a.ipynb")
    with pytest.raises(RegistryError, match="no notebook '9' is registered; .* has 01"):
        find_notebook("9", path.parent, load_registry(path))
