from opdkernels.cli import main

main()
