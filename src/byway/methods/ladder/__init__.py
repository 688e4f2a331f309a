"""Parts of Ladder Side-Tuning: which families (``kinds``), how narrow (``widths``), the side network (``network``) and what it is made of
(``blocks``), how it reads the backbone (``taps``), how it starts (``pruning``, ``importance``) and where its keys and values are kept
(``caches``)."""
