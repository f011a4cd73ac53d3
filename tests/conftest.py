"""What tests of several folders share."""

import hypothesis
import pytest

from metarl.cli import main

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def command(capsys):
    """Run a command in this process: exit status, stdout, stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as error:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return error.value.code, captured.out, captured.err

    return run
