"""Weights of the squared error by timestep, which set the noise levels that training attends to."""

import numpy as np

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, ModelMeanType
from guided_diffusion.runtime.errors import UserError

# k and gamma of P2 (arXiv 2204.00227) and gamma of min-SNR (arXiv 2303.09556), the papers' defaults
_P2_K, _P2_GAMMA, _MIN_SNR_GAMMA = 1.0, 1.0, 5.0


def mse_weights(process: GaussianDiffusion, name: str) -> np.ndarray | None:
    """Weights [T] of the term `mse` of the training loss; None for "none", all 1.

    Of the error of the noise, with the signal-to-noise ratio SNR = abar_t / (1 - abar_t), they are

    - "p2": 1 / (1 + SNR): the less the noise, the less, as only details are then left to learn
      (arXiv 2204.00227);
    - "min_snr": min(SNR, 5) / SNR: the error of x_0 counts 5 where there is little noise, instead
      of SNR, which grows without bound (arXiv 2303.09556).

    A network that predicts x_0 has SNR times those, as the error of the noise is SNR times that of
    x_0.

    :raises UserError: if the process trains on no such error.
    """
    if name == "none":
        return None
    predicts_x0 = process.model_mean_type == ModelMeanType.START_X
    if process.loss_type.is_vb() or process.model_mean_type == ModelMeanType.PREVIOUS_X:
        raise UserError(
            f"--loss_weighting {name} weights the squared error of the noise or of the image, of"
            " which --use_kl True has none: omit one of them"
        )
    abar = process.alphas_cumprod
    snr = abar / (1 - abar)
    if name == "p2":
        of_noise = (_P2_K + snr) ** -_P2_GAMMA
        return of_noise * snr if predicts_x0 else of_noise
    of_x0 = np.minimum(snr, _MIN_SNR_GAMMA)
    return of_x0 if predicts_x0 else of_x0 / snr
