import io

from lora_jax.train.progress import show_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_come_now_and_then_and_at_the_end():
    stream, now = io.StringIO(), 0.0

    def clock():
        return now

    with show_progress("run", 100, stream=stream, every_s=10.0, clock=clock) as show:
        for step in range(1, 101):
            now = float(step) / 4
            show(step, 1.0 / step, 320.0)
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "run: step 40/100",
        "run: step 80/100",
        "run: step 100/100",
    ]
    assert lines[0] == "run: step 40/100  loss 0.0250  320 examples/s  0:15 left"
    assert lines[-1] == "run: step 100/100  loss 0.0100  320 examples/s  evaluating"


def test_time_left_of_a_resumed_run_counts_its_own_steps():
    stream, now = io.StringIO(), 0.0
    with show_progress("run", 100, start=50, stream=stream, every_s=1.0, clock=lambda: now) as show:
        now = 20.0
        show(60, None, None)
    assert stream.getvalue() == "run: step 60/100  1:20 left\n"


def test_terminal_gets_a_bar():
    stream = Terminal()
    with show_progress("reviews", 10, stream=stream) as show:
        show(10, 0.25, 1234.0)
    for words in ("reviews", "10/10", "loss 0.2500", "1,234 examples/s", "evaluating"):
        assert words in stream.getvalue()


def test_switched_off_it_says_nothing(capsys):
    with show_progress("run", 10, enabled=False, every_s=0.0) as show:
        show(10, 0.25, 1.0)
    assert capsys.readouterr() == ("", "")
