"""``asyncagent selftest``: whether this program computes here what it should.

A check is a function of one of these modules; ``registry`` lists them, ``runner`` runs them in a
process of their own, one after the other.
"""
