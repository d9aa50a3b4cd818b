"""Which layers receive one and the same tensor, so that one moment serves all of them (q, k and v)."""

from __future__ import annotations

from torch import Tensor

__all__ = ["SharedInputs"]


class SharedInputs:
    """Follows who is shown which tensor; the first to see one leads those that see it right after.

    Sharing is only right if the same layers follow the same leader at every call: look at :attr:`differs`
    and at the counts of rows before relying on it.

    Args:
        sharing: Without it everyone leads itself.

    Attributes:
        leaders: The leader of every key seen so far.
        differs: Whether a key was seen in another company than before.
    """

    def __init__(self, sharing: bool = True) -> None:
        self.sharing, self.differs = sharing, False
        self.leaders: dict[str, str] = {}
        self._seen: tuple[Tensor, int] | None = None
        self._first = ""
        self._company: set[str] = set()

    def leads(self, key: str, x: Tensor) -> bool:
        """Whether these rows are ``key``'s to count: nobody before it was shown the same tensor."""
        if not self._same(x):
            # held until the next call, so that its memory cannot become another tensor's
            self._seen = None if x.is_inference() else (x, x._version)
            self._first, self._company = key, set()
        leader = self._first if self.sharing else key
        known = self.leaders.setdefault(key, leader)
        if self.sharing and (known != leader or key in self._company):
            self.differs = True
        self._company.add(key)
        return leader == key

    def release(self) -> None:
        """Let go of the last tensor."""
        self._seen, self._first, self._company = None, "", set()

    def _same(self, x: Tensor) -> bool:
        if self._seen is None or x.is_inference():
            return False
        last, version = self._seen
        where = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version)
        return where == (last.data_ptr(), last.shape, last.stride(), last.dtype, version)
