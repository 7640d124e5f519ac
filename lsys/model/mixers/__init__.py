"""One module a token mixer, named as its card in lsys/mixers."""
