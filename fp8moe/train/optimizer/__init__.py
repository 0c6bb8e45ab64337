"""Optimizers: what updates the weights from their gradients, and the state that it keeps."""

from fp8moe.train.optimizer.config import OptimizerConfig as OptimizerConfig
from fp8moe.train.optimizer.deepspeed import DeepSpeedAdamW as DeepSpeedAdamW
from fp8moe.train.optimizer.deepspeed import check_deepspeed as check_deepspeed
from fp8moe.train.optimizer.flat import Optimizer as Optimizer
from fp8moe.train.optimizer.flat import whole_matrices as whole_matrices
