"""What Ray says of a lost actor, in our words."""

from __future__ import annotations

from cluster_jobs.ray.transport import PROCESS_ALONE, death, first_line


def test_the_line_with_the_cause_is_kept_of_a_long_message() -> None:
    error = RuntimeError("The actor died.\n\tpid: 7\nThe actor is dead because its node died.\n")
    assert first_line(error) == "The actor is dead because its node died."
    assert first_line(ValueError("")) == "ValueError"


def test_a_process_that_died_alone_does_not_count_as_a_lost_node() -> None:
    text = f"The actor is dead because its {PROCESS_ALONE}."
    assert death(text, None) == {"death": text}
