"""The least that grpc.aio can do: ModelInfer answered with the bytes of its request, unparsed. `python echo.py PORT N_PROCESSES`."""

import subprocess
import sys

import grpc
import uvloop


async def echo(request: bytes, _: object) -> bytes:
    return request


async def serve(port: str) -> None:
    handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(echo)}
    server = grpc.aio.server(options=[("grpc.so_reuseport", 1)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def main(port: str, n_processes: str = "1") -> None:
    others = [subprocess.Popen([sys.executable, __file__, port]) for _ in range(int(n_processes) - 1)]
    try:
        uvloop.run(serve(port))
    finally:
        for other in others:
            other.terminate()


if __name__ == "__main__":
    main(*sys.argv[1:])
