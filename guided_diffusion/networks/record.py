"""What config.json says about a network."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.networks.config import DiffusionConfig, NetworkConfig
from guided_diffusion.runtime.command_line.flags import from_mapping
from guided_diffusion.runtime.errors import UserError

Network = TypeVar("Network", bound=NetworkConfig)
Network_co = TypeVar("Network_co", bound=NetworkConfig, covariant=True)


@dataclasses.dataclass(frozen=True)
class NetworkRecord(Generic[Network_co]):
    """All that is needed to rebuild a network, its diffusion process and how it reads images.

    classes: their names in the order of their labels, () where there are none.
    """

    model: Network_co
    diffusion: DiffusionConfig
    reading: ReadingConfig
    classes: tuple[str, ...] = ()

    def sections(self, kind: str) -> dict[str, Any]:
        """The sections of config.json, for `checkpoint.write_config`.

        :param kind: the kind of network, one of `trained.KINDS`.
        """
        return {
            "kind": kind,
            "model": self.model,
            "diffusion": self.diffusion,
            "reading": self.reading.to_dict(),
            "classes": list(self.classes),
        }


def read_record(sections: Mapping[str, Any], model_type: type[Network]) -> NetworkRecord[Network]:
    """Build the record that a config.json holds.

    :param sections: the content of the file.
    :param model_type: the configuration class of that kind of network.
    :raises KeyError: if a section is missing.
    :raises UserError: if a value is not what it should be.
    """
    classes = sections.get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError("its classes are not a list of names")
    return NetworkRecord(
        from_mapping(model_type, sections["model"]),
        from_mapping(DiffusionConfig, sections["diffusion"]),
        ReadingConfig.from_dict(sections["reading"]),
        tuple(classes),
    )
