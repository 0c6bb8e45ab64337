"""Settings of `fp8moe plan` to a `Cluster`: the group `cluster` of configs/, which no run has.

    cluster=h800_2048                 a file of configs/cluster; without it h100_8
    cluster.nodes=4 cluster.price_per_gpu_hour=3.1

It is composed by itself, so that a run's configuration has no machine in it that the run does not read.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fp8moe.cli.compose import CONFIGS, keys_of, nearest, parse, to_dataclass, unknown_key
from fp8moe.cli.experiment_file import refuse_resolvers
from fp8moe.errors import ConfigError
from fp8moe.plan.cluster import Cluster

DEFAULT = "h100_8"


def split_settings(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """The settings of the cluster, and those of the run; each in its order."""
    of_cluster = [text for text in settings if parse(text).key_or_group.split(".")[0] == "cluster"]
    return of_cluster, [text for text in settings if text not in of_cluster]


def clusters() -> list[str]:
    """Names of the files of configs/cluster."""
    return sorted(path.stem for path in (CONFIGS / "cluster").glob("*.yaml"))


def compose_cluster(settings: Sequence[str]) -> Cluster:
    """The cluster of settings like cluster=NAME and cluster.nodes=4. Raises ConfigError or ValueError."""
    name, keys = DEFAULT, []
    known = [f"cluster.{key}" for key in keys_of(Cluster)]
    for text in settings:
        override = parse(text)
        key, value = override.key_or_group, override.value()
        if override.type is not OverrideType.CHANGE or override.is_sweep_override():
            raise ConfigError(f"{text!r} must give {key} one value: write {key}=VALUE")
        if key == "cluster":
            if value not in clusters():
                advice = nearest(value, clusters())
                raise ConfigError(f"cluster={value!s:.60} is not one of {', '.join(clusters())}{advice}")
            name = str(value)
        elif key not in known:
            raise unknown_key(key, known)
        else:
            keys.append(text.removeprefix("cluster."))
    try:
        with initialize_config_dir(str(CONFIGS / "cluster"), version_base="1.3"):
            tree = hydra_compose(name, keys)
            refuse_resolvers(OmegaConf.to_container(tree), "cluster")
            plain = OmegaConf.to_container(tree, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).splitlines()[0].rstrip(".")) from error
    return to_dataclass(Cluster, plain, "cluster")
