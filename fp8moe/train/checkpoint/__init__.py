"""Checkpoints: written beside the training, complete or absent, verified before anything is loaded, on any layout."""

from fp8moe.train.checkpoint.choose import choose as choose
from fp8moe.train.checkpoint.choose import choose_weights as choose_weights
from fp8moe.train.checkpoint.choose import readable_state as readable_state
from fp8moe.train.checkpoint.choose import readable_weights as readable_weights
from fp8moe.train.checkpoint.config import CheckpointConfig as CheckpointConfig
from fp8moe.train.checkpoint.folder import candidates as candidates
from fp8moe.train.checkpoint.folder import complete as complete
from fp8moe.train.checkpoint.folder import find as find
from fp8moe.train.checkpoint.folder import load as load
from fp8moe.train.checkpoint.folder import save as save
from fp8moe.train.checkpoint.folder import stored_names as stored_names
from fp8moe.train.checkpoint.manifest import problems as problems
from fp8moe.train.checkpoint.pieces import run_tensors as run_tensors
from fp8moe.train.checkpoint.saver import Saver as Saver
from fp8moe.train.checkpoint.state import FREE_FIELDS as FREE_FIELDS
from fp8moe.train.checkpoint.state import RunState as RunState
from fp8moe.train.checkpoint.state import read_state as read_state
from fp8moe.train.checkpoint.state import state_text as state_text
