"""BERT-Attack on 1,000 class prompts against the same attack assembled from TextAttack's parts.

TextAttack works on one prompt after the other, so its time is proportional to their number: it is measured on 50
prompts and multiplied by 20. Two assemblies: one whose goal is reached with the first swap, so that its search stops
there, and one like TextAttack's recipes, where the search goes on through all words and a constraint refuses more.
"""

from side_by_side import Timing, side_by_side

from robustclip import models
from robustclip.attacks.from_textattack import ReferenceBertAttack
from robustclip.attacks.text import BertAttack
from robustclip.component import component
from robustclip.data.roles import role
from robustclip.models import Clip
from robustclip.progress import progress

EVERY = 20  # TextAttack sees one prompt in so many


@component
class SearchingOn(ReferenceBertAttack):
    """The assembly whose search never counts as done."""

    def goal(self, clip: Clip):
        goal = super().goal(clip)
        goal.maximizable = True
        return goal


def measure(rounds: int = 3) -> list[dict]:
    """One row per assembly."""
    rivals = {"stopping at the swap": ReferenceBertAttack(), "searching on, as recipes do": SearchingOn()}
    return [duel(name, rival, rounds) for name, rival in progress(rivals.items(), "text attacks", unit="case")]


def duel(name: str, rival: ReferenceBertAttack, rounds: int) -> dict:
    """Our attack on all prompts of role `imagenet`, TextAttack's on some, in turns."""
    clip, prompts = models.load(device="cpu"), role("imagenet").prompts
    timing = side_by_side(lambda: BertAttack()(clip, prompts), lambda: rival(clip, prompts[::EVERY]), rounds)
    same = sum(map(str.__eq__, timing.our_result[::EVERY], timing.rival_result))
    whole = Timing(timing.ours, [EVERY * spent for spent in timing.rival], timing.our_result, timing.rival_result)
    return whole.row(
        f"BERT-Attack, {len(prompts):,} prompts, TextAttack {name}",
        note=f"rival: {len(timing.rival_result)} prompts times {EVERY} (linear); {same} of them swapped alike",
    )
