"""What the demonstration measured, as one object and as JSON's types."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .library import LibraryRun
from .photo import PhotoError
from .train import Training

PICTURES = {
    "loss.png": "Loss curves of the two networks, torch.nn's and truenorm's on each other",
    "photographs.png": "Two photographs before, normalized by batch and by instance statistics",
}
# file, layer, shape of the input
EXAMPLES = (
    ("InstanceNorm1d.png", "InstanceNorm1d", (2, 3, 5)),
    ("InstanceNorm2d.png", "InstanceNorm2d", (1, 3, 2, 2)),
    ("BatchNorm1d.png", "BatchNorm1d", (128, 3, 512)),
    ("BatchNorm2d.png", "BatchNorm2d", (2, 3, 5, 6)),
)
FILES = ("index.html", "results.json", *PICTURES, *(file for file, _, _ in EXAMPLES))


@dataclass(frozen=True)
class Results:
    """All numbers of the page.

    library: a model of another library; None without transformers.
    explained: by picture, the title and the largest difference of truenorm and of torch from the
        result by hand.
    """

    trainings: list[Training]
    library: LibraryRun | None
    photo_errors: list[PhotoError]
    explained: dict[str, tuple[str, float, float]]
    epochs: int
    seconds: float

    def to_dict(self, made_by: str, environment: dict[str, Any]) -> dict[str, Any]:
        return {
            "made_by": made_by,
            "files": list(FILES),
            "environment": environment,
            "epochs": self.epochs,
            "seconds": self.seconds,
            "training": [
                {
                    **asdict(t),
                    "largest_loss_difference": t.largest_loss_difference,
                    "largest_nudged_difference": t.largest_nudged_difference,
                    "time_ratio": t.ratio,
                    "time_ratio_quartiles": list(t.ratio_quartiles),
                }
                for t in self.trainings
            ],
            "library": None
            if self.library is None
            else {
                **asdict(self.library),
                "largest_loss_difference": self.library.largest_loss_difference,
                "largest_nudged_difference": self.library.largest_nudged_difference,
                "time_ratio": self.library.ratio,
                "time_ratio_quartiles": list(self.library.ratio_quartiles),
            },
            "photograph": [asdict(e) for e in self.photo_errors],
            "explained": {
                file: {"title": title, "truenorm": ours, "torch": theirs}
                for file, (title, ours, theirs) in self.explained.items()
            },
        }
