"""The flags of the commands: a mistake in them is one sentence, and ends with status 2."""

import sys

from absl import flags


def parse(arguments):
    """Takes the flags of `app.run`; a field that the configuration file does not have is a mistake, too."""
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (AttributeError, KeyError) as error:
        cause = error.args[0]
        field = " ".join(str(cause.args[0] if isinstance(cause, KeyError) else cause).split())
        hint = (
            "write it into a copy of the file, or replace a whole section: --config.method=\"{'name': ...}\""
        )
        print(f"error: the configuration has no field {field}; {hint}", file=sys.stderr)
        sys.exit(2)
