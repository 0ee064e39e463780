"""`python -m edif_mesh.cli` is `edif`."""

from edif_mesh.cli.main import main

if __name__ == "__main__":
    main()
