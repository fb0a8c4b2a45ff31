"""ConvNet+LSTM of Quo Vadis: Inception-v1 on each frame, a batch-normalised LSTM over time.

Sources: J. Carreira and A. Zisserman (arXiv 1705.07750) §2.1; T. Cooijmans et al., "Recurrent Batch Normalization"
(arXiv 1603.09025) §3 and §4.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from distinit_plugin.models.c3d import check_several_clips
from distinit_plugin.models.inception import padding_gaps, scaled
from distinit_plugin.models.inception2d import InceptionTrunk2D
from distinit_plugin.models.network import ClassifiedNetwork, InputSpec
from distinit_plugin.registry import MODELS
from distinit_plugin.types import LayerInfo, ModelOutput

HIDDEN = 512  # units of the LSTM at width 64
STEPS_WITH_STATISTICS = 25  # the frames of a training clip in Quo Vadis
INITIAL_FACTOR = 0.1  # Cooijmans et al. §4: larger ones let gradients vanish
EPS = 1e-5


class StepwiseNorm(nn.Module):
    """Batch normalisation of (B,C) at a time step: one factor (and summand) for all steps, statistics for each.

    In training every step takes the mean and variance of its own batch. Running means and variances are kept for the
    first :data:`STEPS_WITH_STATISTICS` steps one by one, because states change most after their zero start; later steps
    share those of the last (Cooijmans et al. §3). Where training clips are shorter, the steps that they do not have get
    the statistics of their last one, so that a network can be tested on clips of any length.
    """

    def __init__(self, channels: int, *, has_summand: bool) -> None:
        """Build; without a summand, that of the sum that it enters stands for it."""
        super().__init__()
        self.factor = nn.Parameter(torch.full((channels,), INITIAL_FACTOR))
        self.summand = nn.Parameter(torch.zeros(channels)) if has_summand else None
        self.steps = nn.ModuleList(
            nn.BatchNorm1d(channels, eps=EPS, affine=False) for _ in range(STEPS_WITH_STATISTICS)
        )

    def forward(self, x: Tensor, step: int, *, is_last: bool) -> Tensor:
        """(B,C) → (B,C); ``is_last``: no step of this clip follows."""
        if self.training and is_last:
            with torch.no_grad():
                for norm in self.steps[step + 1 :]:
                    norm(x)
        x = self.steps[min(step, len(self.steps) - 1)](x) * self.factor
        return x if self.summand is None else x + self.summand


class NormalizedLSTM(nn.Module):
    """LSTM whose sums are batch-normalised (Cooijmans et al., equations 6 to 8), from states of zero.

    (i, f, g, o) = BN(W_h h) + BN(W_x x) + b;  c' = σ(f)·c + σ(i)·tanh(g);  h' = σ(o)·tanh(BN(c')).
    The three normalisations have factors and statistics of their own; only that of the cell has a summand, as b serves
    the other two. Beyond a plain LSTM's weights and one bias these are 4H + 4H + 2H parameters.
    """

    def __init__(self, in_features: int, hidden: int) -> None:
        """Build: input kernels Xavier-uniform, recurrent ones orthogonal per gate, bias 0 but 1 for the forget gate."""
        super().__init__()
        self.hidden = hidden
        self.input_weight = nn.Parameter(torch.empty(4 * hidden, in_features))
        self.hidden_weight = nn.Parameter(torch.empty(4 * hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(4 * hidden))
        self.input_norm = StepwiseNorm(4 * hidden, has_summand=False)
        self.hidden_norm = StepwiseNorm(4 * hidden, has_summand=False)
        self.cell_norm = StepwiseNorm(hidden, has_summand=True)
        with torch.no_grad():
            nn.init.xavier_uniform_(self.input_weight)
            for gate in self.hidden_weight.chunk(4):
                nn.init.orthogonal_(gate)
            self.bias.chunk(4)[1].fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B,T,D) → the hidden states (B,T,H), in fp32 or better also where mixed precision is on.

        Normalisation takes off what the clips of a batch share, so that rounding weighs more in what is left: bf16
        products move the states by 6 % where features differ by 5 %.
        """
        device_type, x = x.device.type, x.to(self.bias.dtype)
        if not torch.amp.is_autocast_available(device_type):  # the meta device
            return self._run(x)
        with torch.autocast(device_type, enabled=False):
            return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        inputs = functional.linear(x, self.input_weight)
        hidden = cell = x.new_zeros(x.shape[0], self.hidden)
        states: list[Tensor] = []
        for step in range(x.shape[1]):
            at = {"step": step, "is_last": step == x.shape[1] - 1}
            recurrent = self.hidden_norm(functional.linear(hidden, self.hidden_weight), **at)
            sums = recurrent + self.input_norm(inputs[:, step], **at) + self.bias
            input_gate, forget_gate, candidate, output_gate = sums.chunk(4, dim=1)
            cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
            hidden = output_gate.sigmoid() * self.cell_norm(cell, **at).tanh()
            states.append(hidden)
        return torch.stack(states, dim=1)


@MODELS.register()
class ConvLSTM(ClassifiedNetwork):
    """Inception-v1 → global average of each frame → LSTM of 512 units → ``fc`` at each step.

    Logits and features are those of the last step. While the LSTM trains ``logits_over_time`` has the logits of all
    steps, so that losses on the network's own logits act at each of them (§2.1: cross-entropy at all time steps, the
    output on the last frame in the test). Under a frozen LSTM the classifier trains on the features that the test will
    read, those of the last step: in the paper's *Fixed* protocol a frozen network gives the features of a video and a
    softmax classifier is trained on them. In the paper a clip is 25 frames, one in five at 25 frames per second, and 50
    in the test.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        input: InputSpec,
        width: int = 64,
        padding: str = "same",
        affine_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        """Build.

        Args:
            num_classes: K; 0: no classifier.
            input: The clip that the network is fed.
            width: Channels of the first convolution; 64 in the papers. All layers scale with it, the LSTM too.
            padding: ``same`` or ``symmetric``, see :class:`InceptionTrunk2D`.
            affine_norm: Whether the trunk's normalisation has a factor.
            dropout: Dropped fraction before the classifier.

        Raises:
            UserError: A switch outside its range.
        """
        super().__init__(input)
        self.trunk = InceptionTrunk2D(input.channels, padding=padding, affine_norm=affine_norm, width=width)
        self.lstm = NormalizedLSTM(self.trunk.out_channels, scaled(HIDDEN, width))
        self.dropout_rate = dropout
        self.reset_classifier(num_classes)

    @property
    def image_trunks(self) -> Mapping[str, str]:
        """What runs on each frame."""
        return {"trunk.": "googlenet"}

    @property
    def image_gaps(self) -> tuple[str, ...]:
        """TensorFlow's padding."""
        return padding_gaps(self.trunk.padding, self.input)

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """TF-slim's end-points of the trunk (or the papers' shorthand); the maps of all frames."""
        return self.trunk.layers

    @property
    def feature_dim(self) -> int:
        """Units of the LSTM."""
        return self.lstm.hidden

    def forward(
        self, views: Mapping[str, Tensor], *, boxes: Tensor | None = None, taps: Collection[str] = ()
    ) -> ModelOutput:
        """Run on the clip (``rgb`` or ``flow``), normalised (B,C,T,H,W) with any T.

        Raises:
            UserError: Training on a single clip, whose states cannot be normalised.
        """
        self.check_taps(taps)
        clip = views[self.input.modality]
        check_several_clips(self, clip, self.lstm.training)
        feature_map, kept = self.trunk.run_frames(clip, taps)
        pooled = feature_map.to(self.lstm.bias.dtype).mean(dim=(3, 4))
        states = self.lstm(pooled.transpose(1, 2))
        features = states[:, -1]
        at_all_steps = self.lstm.training
        logits = self.classify(states if at_all_steps else features)
        if logits is None or not at_all_steps:
            return ModelOutput(logits, features, kept)
        return ModelOutput(logits[:, -1], features, kept, logits.transpose(1, 2))
