"""Speed of the scored and learning policies beside libCacheSim: `python benchmarks/policy_speed_scores.py [--policy
lirs]`.

The measurement and the options are those of `policy_speed.py`.
"""

from __future__ import annotations

import policy_speed

RIVALS = {
    "lru": ("LRU", {}),
    "random": ("Random", {}),
    "lru-k": ("LRUK", {}),
    "gdsf": ("GDSF", {}),
    "hyperbolic": ("Hyperbolic", {}),
    "lirs": ("LIRS", {}),
    "wtinylfu": ("WTinyLFU", {}),
    "lecar": ("LeCaR", {}),
}

if __name__ == "__main__":
    policy_speed.RIVALS = RIVALS
    policy_speed.main()
