"""The three command lines: an option given twice is refused, never taken at its last value."""

import pytest
import typer

import glm4v_nb.cli
import nbsweep.cli
import simgpu.cli

PROGRAMS = {"glm4v-nb": glm4v_nb.cli, "nbsweep": nbsweep.cli, "simgpu": simgpu.cli}


def _options_with_a_value():
    for name, program in PROGRAMS.items():
        for command in typer.main.get_command(program.app).commands.values():
            for option in command.params:
                if option.param_type_name == "option" and not option.is_flag:
                    yield name, command.name, option


OPTIONS = list(_options_with_a_value())
ONCE = [each for each in OPTIONS if not each[2].multiple]


@pytest.mark.parametrize(
    ("program", "command", "option"), ONCE, ids=[f"{a} {b} {c.opts[0]}" for a, b, c in ONCE]
)
def test_an_option_given_twice_is_refused_with_both_values(program, command, option, capfd):
    first, last = option.opts[0], option.opts[-1]
    assert PROGRAMS[program].main([command, first, "1", f"{last}=2"]) == 2
    said = f"error: {' / '.join(option.opts)} is given twice, '1' and '2'; give it once.\n"
    assert capfd.readouterr() == ("", said)


def test_the_only_options_that_take_several_are_the_parameters_of_a_notebook():
    several = {(command, each.opts[0]) for _, command, each in OPTIONS if each.multiple}
    assert several == {("run", "-p")}


def test_the_options_of_a_script_are_its_own(tmp_path, capfd):
    (tmp_path / "a.py").write_text("import sys\nprint(sys.argv[1:])\n")
    script = [str(tmp_path / "a.py"), "--card", "x", "--card", "y"]
    assert simgpu.cli.main(["run", "--card", "L4", *script]) == 0
    assert "['--card', 'x', '--card', 'y']" in capfd.readouterr().out
