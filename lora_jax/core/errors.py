"""The one error a user's request can raise."""


class RequestError(ValueError):
    """What was asked for cannot be done; the message names the value, the place and the way out.

    The command line prints it as one line and exits with code 2; a library user catches it as a
    `ValueError`.
    """


def not_a_parameter(what: str) -> RequestError:
    """What is raised wherever W + ΔW is asked of an adapter that has none."""
    return RequestError(
        f"{what} adds to the computation and not to a parameter, so no array holds its change: it "
        "cannot be merged, exported to PEFT, analysed or added to others; keep it bound, and call "
        "the model through lora_jax.lift"
    )
