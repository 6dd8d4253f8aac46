"""The hub: names pinned to commits, downloads resumed and checked, ported models published.

hub.py          BASE, PATCH and MODEL by name: a local directory, or a repository at one commit
downloading.py  files of a repository, downloaded into the hub's cache and checked against their SHA-256
releases.py     a published release copied into a folder of the project
publishing.py   a ported directory uploaded and checked
refusals.py     errors of the hub and its library as one line, without the token
"""
