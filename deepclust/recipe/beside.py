"""What happens beside a run: the section on alarms, and the names of trackers.

Neither changes a result, so both may change when a run is resumed.
"""

from __future__ import annotations

from typing import Literal, Self, TypeAlias

from pydantic import Field, model_validator

from deepclust.recipe.sections import Section

TrackerName: TypeAlias = Literal["tensorboard", "mlflow", "wandb"]
Incident: TypeAlias = Literal["failure", "collapse", "end", "preemption"]


class NotifySection(Section):
    """Who is to hear of a run that fails, collapses, ends or is preempted."""

    command: str | None = Field(
        None,
        min_length=1,
        description="a shell command, given the message as JSON on stdin and the variables "
        "DEEPCLUST_INCIDENT, DEEPCLUST_RUN and DEEPCLUST_TEXT",
    )
    webhook: str | None = Field(
        None,
        pattern=r"^(https?://[^\s/]+\S*|\$[A-Za-z_]\w*)$",
        description="a URL that the message is posted to as JSON, or $NAME of the variable of the "
        "environment that holds it",
    )
    on: tuple[Incident, ...] = Field(
        ("failure", "collapse", "end", "preemption"), description="which incidents are reported"
    )
    timeout: float = Field(
        10.0, gt=0, le=60, description="seconds that a command or webhook may take"
    )

    @model_validator(mode="after")
    def _reaches_somebody(self) -> Self:
        if self.command is None and self.webhook is None:
            raise ValueError("set notify.command or notify.webhook, or leave notify out (null)")
        return self
