"""How images and students are computed: the same maths, faster."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cvdd.schema.types import Positive
from cvdd.support.config_base import StrictConfig


class EngineConfig(StrictConfig):
    """How members judge, teachers label and students learn; part of what is made, because it shows in the last bits."""

    compile: Literal["auto"] | bool = Field(
        "auto",
        description="compile the members' judgements; auto where more time is saved than a compiler takes. Only votes "
        "on BatchNorm statistics of units are compiled, and only where there is a compiler",
    )
    compile_labels: Literal["auto"] | bool = Field(
        "auto",
        description="compile the teachers' passes over full stacks, where there is a compiler; on a CPU only what uses "
        "the batch's statistics. Auto where more time is saved than a compiler takes, on a CPU in bf16 alone",
    )
    compile_students: bool = Field(
        False,
        description="compile the passes of students through full batches, where there is a compiler. Narrow networks "
        "gain by it, wide ones do not",
    )
    compile_members: bool = Field(
        False, description="compile the passes of members through full batches while they are trained, likewise"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="of the members' convolutions as they vote; auto is bf16 on a GPU that has it and fp32 elsewhere",
    )
    precision_members: Literal["auto", "fp32", "bf16"] = Field(
        "fp32", description="of the members' convolutions while they are trained; auto as for precision"
    )
    precision_labels: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the teachers' convolutions; in bf16 logits have errors of about a hundredth"
    )
    precision_students: Literal["auto", "fp32", "bf16"] = Field(
        "fp32",
        description="of the students' convolutions while they learn; auto as for precision. In bf16 gradients are "
        "noisier",
    )
    cuda_graphs: Literal["auto"] | bool = Field(
        "auto",
        description="record steps on a GPU and launch them as a whole, with the same kernels; auto wherever there is a "
        "GPU. Iterations with moving statistics, voters in turn or units that ranks share are not recorded",
    )
    units_per_pass: Literal["auto"] | Positive = Field(
        "auto", description="units of a stack that a member judges in one forward pass; auto by their size"
    )
