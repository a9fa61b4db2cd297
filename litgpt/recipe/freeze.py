"""Which parts of a model that sees or hears are not trained."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class FreezeArgs:
    """Parts of a model that sees or hears that a run leaves as they are; an adapter adds nothing to them."""

    llm: bool = False
    """Freeze the decoder, with embedding and head."""
    vision: bool = True
    """Freeze the vision tower."""
    audio: bool = True
    """Freeze the audio tower."""
    aligner: bool = True
    """Freeze the projectors from towers to the decoder."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the frozen parts."""
        return tuple(entry.name for entry in fields(self) if getattr(self, entry.name))
