"""How fast the machine's cores could train, component by component, and how fast they do.

- ``components``: what is measured: the objects that training uses, driven as fast as they go.
- ``reference``: the same work done plainly, as a yardstick that stays as it is.
- ``child``, ``children``: measuring processes, one per core, all at the same work at once.
- ``sweep``: every component at the best of several settings.
- ``bound``: what perfect packing of the components would give.
- ``training``: what a real run gives; ``leash`` ends it with us.
"""
