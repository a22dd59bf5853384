"""GGPO in sd-scripts: ``--network_module lora_ggpo.integrations.kohya``.

The network is sd-scripts' own for the model at hand (``networks.lora``, ``networks.lora_flux``, ...), with its layers,
its files and its settings. With ``--network_args ggpo_sigma=0.03 ggpo_rule=relative ggpo_beta=0.5`` what begins with
``ggpo_`` is a field of :class:`~lora_ggpo.GGPOConfig`; all else is sd-scripts'.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
from collections.abc import Mapping
from dataclasses import replace
from types import FrameType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..perturbation import GGPO, GGPOConfig, Parts, register_layer
from ..perturbation.own import own_adapter

logger = logging.getLogger(__name__)

_NETWORKS = {
    **dict.fromkeys(("flux_models", "chroma_models"), "lora_flux"),
    "sd3_models": "lora_sd3",
    "lumina_models": "lora_lumina",
    "hunyuan_image_models": "lora_hunyuan_image",
    "anima_models": "lora_anima",
}
"""sd-scripts' module for a network, by that of its class of models; for all others, SD and SDXL, it is ``lora``."""

_PREFIX, _STATE = "ggpo_", "ggpo"
_WORDS = {"true": True, "false": False, "none": None}


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: Any,
    unet: Any,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> nn.Module:
    """sd-scripts' network with GGPO's noise; its training script calls this.

    Raises:
        ValueError: a ``ggpo_`` argument is no field of :class:`~lora_ggpo.GGPOConfig`, or outside of its range.
    """
    config, rest = _settings(kwargs)
    network = _networks(unet).create_network(
        multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=neuron_dropout, **rest
    )
    return _with_noise(network, config)


def create_network_from_weights(
    multiplier: float,
    file: str,
    vae: Any,
    text_encoder: Any,
    unet: Any,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """sd-scripts' network of the shape of saved weights, with GGPO's noise unless it is for inference; and the weights.

    Raises:
        ValueError: as :func:`create_network`.
    """
    config, rest = _settings(kwargs)
    network, weights = _networks(unet).create_network_from_weights(
        multiplier, file, vae, text_encoder, unet, weights_sd=weights_sd, for_inference=for_inference, **rest
    )
    return network if for_inference else _with_noise(network, config), weights


def _networks(unet: Any) -> Any:
    name = type(unet).__module__.rpartition(".")[2]
    return importlib.import_module(f"networks.{_NETWORKS.get(name, 'lora')}")


def _settings(arguments: Mapping[str, Any]) -> tuple[GGPOConfig, dict[str, Any]]:
    """The settings of GGPO among the arguments, which come as text, and the other arguments."""
    own = {key.removeprefix(_PREFIX): _value(text) for key, text in arguments.items() if key.startswith(_PREFIX)}
    return GGPOConfig.from_dict(own), {key: v for key, v in arguments.items() if not key.startswith(_PREFIX)}


def _value(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _parts(lora: Any) -> Parts:
    """Those of an sd-scripts LoRAModule. With split_qkv it has an A and a B for each part of the outputs."""
    base, scale = lora.org_forward.__self__, lora.multiplier * lora.scale
    if not isinstance(lora.lora_down, nn.ModuleList):
        return Parts(base, lora.lora_down, lora.lora_up, scale)
    return Parts(
        base,
        lambda: torch.cat([one.weight for one in lora.lora_down]),
        lambda: torch.block_diag(*(one.weight for one in lora.lora_up)),
        scale,
    )


def _with_noise(network: Any, config: GGPOConfig) -> nn.Module:
    for cls in {type(lora) for lora in (*network.text_encoder_loras, *network.unet_loras)}:
        register_layer(cls, _parts)
    network.__class__ = type("GGPONetwork", (NoisyNetwork, type(network)), {})
    network._begin(config)
    return network


class NoisyNetwork(nn.Module):
    """What an sd-scripts network does besides, in the places where the training loop calls it.

    Each model that the network adapts (the denoiser, text encoders) has a :class:`~lora_ggpo.GGPO` of its own, in
    ``ggpos``, since each is called by itself.
    """

    def _begin(self, config: GGPOConfig) -> None:
        self._config = config
        self.ggpos: list[GGPO] = []
        self._arguments: Any = None
        self._saved: dict[str, Tensor] = {}
        self._under_way = self._saves_weights = self._told = False
        self._scale = 1.0

    def prepare_network(self, args: Any) -> None:
        """The training script shows its arguments before it knows its last: the number of steps is read later."""
        self._arguments = args

    def on_step_start(self, text_encoder: Any, unet: Any) -> None:
        """A micro-batch begins."""
        self.count_step()
        if not self.ggpos:
            self._attach([*(text_encoder if isinstance(text_encoder, list) else [text_encoder]), unet])
        self._under_way = True
        self._scale = _loss_scale(inspect.currentframe())

    def count_step(self) -> None:
        """Count an optimizer step if there was one: the loop clears the gradients after each."""
        if not self._under_way or any(parameter.grad is not None for parameter in self.parameters()):
            return
        self._under_way = False
        for ggpo in self.ggpos:
            ggpo.step(self._scale)
        if not self._told:
            self._told = True
            shares = ", ".join(f"{ggpo.metrics().get('ggpo/coverage', 0):.0%}" for ggpo in self.ggpos)
            logger.info(f"GGPO: the noise reached {shares} of the adapted layers of each model")

    def _attach(self, models: list[Any]) -> None:
        inner = [getattr(model, "module", model) for model in models if isinstance(model, nn.Module)]
        adapted = [model for model in inner if any(own_adapter(module) for module in model.modules())]
        steps = getattr(self._arguments, "max_train_steps", None)
        for index, model in enumerate(adapted):
            self.ggpos.append(GGPO(model, replace(self._config, seed=self._config.seed + index), total_steps=steps))
        self._restore()

    def get_trainable_params(self) -> Any:
        """The loop asks for these to clip them, when it has averaged gradients over processes: they are read again."""
        for ggpo in self.ggpos:
            if ggpo._captured:  # not a text encoder that took no part in the step
                ggpo._capture()
        return super().get_trainable_params()  # type: ignore[misc]

    def update_norms(self) -> None:
        """Nothing: GGPO reads gradients as each backward pass ends, and before they are clipped."""

    def update_grad_norms(self) -> None:
        """Nothing, as :meth:`update_norms`."""

    def weight_norms(self) -> None:
        """None, which the loop does not log; it asks for the next two only where there is this one."""

    def grad_norms(self) -> Tensor | None:
        """The mean of ||G_i|| over each layer's rows, for the loop to log."""
        return self._means("gradient")

    def combined_weight_norms(self) -> Tensor | None:
        """The mean of ||W'_i|| over each layer's rows, for the loop to log."""
        return self._means("weight")

    def _means(self, norms: str) -> Tensor | None:
        self.count_step()
        known = [getattr(group, norms) for ggpo in self.ggpos for group in ggpo._groups]
        means = [rows.sqrt().mean(-1) for rows in known if rows is not None]
        return torch.cat(means) if means else None

    def save_weights(self, file: str, dtype: Any, metadata: Any) -> None:
        """The weights alone, as sd-scripts saves them."""
        self._saves_weights = True
        try:
            super().save_weights(file, dtype, metadata)  # type: ignore[misc]
        finally:
            self._saves_weights = False

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """With GGPO's state in it, for ``--save_state``; not in files of weights, nor inside of DDP's."""
        state = super().state_dict(*args, **kwargs)
        if not (self._saves_weights or args or kwargs):
            self.count_step()
            own = {f"{i}/{key}": x for i, ggpo in enumerate(self.ggpos) for key, x in ggpo.state_dict().items()}
            state[_STATE] = torch.frombuffer(bytearray(safetensors.torch.save(own or self._saved)), dtype=torch.uint8)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Also of a state with GGPO's in it."""
        weights = dict(state_dict)
        if (own := weights.pop(_STATE, None)) is not None:
            self._saved = safetensors.torch.load(own.cpu().numpy().tobytes())
            self._restore()
        return super().load_state_dict(weights, *args, **kwargs)

    def _restore(self) -> None:
        for index, ggpo in enumerate(self.ggpos):
            own = {key.partition("/")[2]: x for key, x in self._saved.items() if key.startswith(f"{index}/")}
            if own:
                ggpo.load_state_dict(own)
        self._saved = self._saved if not self.ggpos else {}


def _loss_scale(frame: FrameType | None) -> float:
    """The factor on the loss in fp16. The network is not told of it: the loop that calls it has the accelerator."""
    caller = frame and frame.f_back
    scaler = getattr(caller and caller.f_locals.get("accelerator"), "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
