"""Figures and pictures of the README, of docs/ and of STUDIES.md, from the files under results/."""
