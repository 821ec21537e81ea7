"""The one error a user's request can raise."""


class RequestError(ValueError):
    """What was asked for cannot be done; the message names the value, the place and the way out.

    The command line prints it as one line and exits with code 2; a library user catches it as a
    `ValueError`.
    """
