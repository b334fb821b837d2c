"""`python -m treeify`, which `torchrun` and `accelerate launch` start several times."""

from treeify.cli.app import main

if __name__ == "__main__":
    main()
