"""What can go wrong, as exceptions with exit codes. Imports nothing."""

EXIT_BUG, EXIT_INPUT, EXIT_ENVIRONMENT, EXIT_INCOMPLETE = 1, 2, 3, 4


class StageError(Exception):
    """What went wrong and what to do about it: `where: what. remedy.`, an argument each when there
    are several."""

    exit_code = 1

    def __str__(self):
        return "\n".join(map(str, self.args))


class InputError(StageError):
    """A bad setting, dataset or model choice: the user can correct it."""

    exit_code = EXIT_INPUT


class EnvironmentFailure(StageError):
    """Disk, network, access rights or a damaged artifact."""

    exit_code = EXIT_ENVIRONMENT


class Terminated(BaseException):
    """SIGTERM arrived. A BaseException, like KeyboardInterrupt, so that no handler swallows it."""
