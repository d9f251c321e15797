"""The store: every result is a sealed directory that is complete, or it does not exist.

An artefact lives at ``<store>/<kind>/<name>-<digest>/``. The digest covers the part of the configuration that changes
the result and the digests of the parents. It is built in ``<store>/<kind>/.partial/``, where an interrupted build goes
on, and renamed into place with a ``manifest.json`` that lists every file with its checksum.
"""

from cvdd.artifact.files import StoreError, write_atomically
from cvdd.artifact.manifest import (
    FORMAT,
    MANIFEST,
    Artifact,
    DamagedArtifact,
    digest_of,
    file_checksum,
    parents_of,
    read_manifest,
    verify,
)
from cvdd.artifact.parts import Maker, Parts
from cvdd.artifact.store import Store

__all__ = [
    "FORMAT",
    "MANIFEST",
    "Artifact",
    "DamagedArtifact",
    "Maker",
    "Parts",
    "Store",
    "StoreError",
    "digest_of",
    "file_checksum",
    "parents_of",
    "read_manifest",
    "verify",
    "write_atomically",
]
