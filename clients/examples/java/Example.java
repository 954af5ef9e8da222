import com.google.gson.Gson;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.ClientInterceptor;
import io.grpc.Context;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.MetadataUtils;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Iterator;
import java.util.Map;
import java.util.concurrent.TimeUnit;
import shoplm.v1.ChatRequest;
import shoplm.v1.ChatResponse;
import shoplm.v1.ChatServiceGrpc;
import shoplm.v1.Customer;
import shoplm.v1.GetModelRequest;
import shoplm.v1.GetModelResponse;
import shoplm.v1.Message;
import shoplm.v1.ModelServiceGrpc;
import shoplm.v1.PredictRequest;
import shoplm.v1.Prediction;
import shoplm.v1.PredictionServiceGrpc;
import shoplm.v1.RecommendRequest;
import shoplm.v1.RecommendationServiceGrpc;
import shoplm.v1.RecommendedItem;

/**
 * Recommendations, predictions and a chat from a ShopLM server, with deadlines, retries, a token and error details.
 *
 * <p>{@code java Example [customer id]}; SHOPLM_ADDRESS and SHOPLM_TOKEN say where and as whom.
 */
public final class Example {
  public static void main(String[] args) throws Exception {
    String address = System.getenv().getOrDefault("SHOPLM_ADDRESS", "127.0.0.1:50051");
    Map<String, ?> retries = new Gson().fromJson(Files.readString(Path.of("../service_config.json")), Map.class);
    ManagedChannel channel =
        ManagedChannelBuilder.forTarget(address)
            .usePlaintext()
            .enableRetry()
            .defaultServiceConfig(retries)
            .intercept(token())
            .build();
    try {
      call(channel, args);
    } catch (StatusRuntimeException error) {
      explain(error);
    } finally {
      channel.shutdownNow();
    }
  }

  private static void call(ManagedChannel channel, String[] args) {
    var models = ModelServiceGrpc.newBlockingStub(channel).withDeadlineAfter(30, TimeUnit.SECONDS);
    GetModelResponse model = models.getModel(GetModelRequest.getDefaultInstance());
    String id = args.length > 0 ? args[0] : model.getDemoCustomerIds(0);
    Customer customer = Customer.newBuilder().setCustomerId(id).build();

    // The server sees the deadline; it counts from here, so each call gets a stub of its own.
    var recommendations = RecommendationServiceGrpc.newBlockingStub(channel);
    var asked = RecommendRequest.newBuilder().setCustomer(customer).setCount(3);
    for (RecommendedItem item :
        recommendations.withDeadlineAfter(30, TimeUnit.SECONDS).recommend(asked.build()).getItemsList()) {
      System.out.printf("item: %s %s %.2f%n", item.getItemId(), item.getTitle(), item.getScore());
    }

    var predictions = PredictionServiceGrpc.newBlockingStub(channel).withDeadlineAfter(30, TimeUnit.SECONDS);
    var wanted = PredictRequest.newBuilder().setCustomer(customer).addTargets(model.getTargets(0));
    Prediction first = predictions.predict(wanted.build()).getPredictions(0);
    System.out.printf(
        "prediction: %s within %d days %.3f%n",
        first.getTarget().getKind(), first.getTarget().getHorizonDays(), first.getProbability());

    var chats = ChatServiceGrpc.newBlockingStub(channel);
    var question = Message.newBuilder().setRole("user").setContent("What does delivery cost?");
    var turn = ChatRequest.newBuilder().setCustomer(customer).addMessages(question).setMaxTokens(32).build();
    System.out.print("chat: ");
    Iterator<ChatResponse> events = chats.withDeadlineAfter(60, TimeUnit.SECONDS).chat(turn);
    while (events.hasNext()) {
      ChatResponse event = events.next();
      System.out.print(event.getDelta());
      if (event.hasSummary()) {
        System.out.printf("%nended: %s%n", event.getSummary().getFinishReason());
      }
    }

    question.setContent("Tell me everything about coffee.");
    var more = ChatRequest.newBuilder().addMessages(question).build();
    Context.CancellableContext context = Context.current().withCancellation();
    context.run(
        () -> {
          Iterator<ChatResponse> broken = chats.withDeadlineAfter(60, TimeUnit.SECONDS).chat(more);
          broken.next();
          context.cancel(null); // the server stops computing within one step
          try {
            while (broken.hasNext()) {
              broken.next();
            }
          } catch (StatusRuntimeException error) {
            System.out.println("cancelled: " + (error.getStatus().getCode() == Status.Code.CANCELLED));
          }
        });

    recommendations.withDeadlineAfter(30, TimeUnit.SECONDS).recommend(asked.setCount(1_000_000).build());
  }

  /** The token of every call, where there is one. */
  private static ClientInterceptor token() {
    Metadata headers = new Metadata();
    String token = System.getenv("SHOPLM_TOKEN");
    if (token != null) {
      headers.put(Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER), "Bearer " + token);
    }
    return MetadataUtils.newAttachHeadersInterceptor(headers);
  }

  /** Prints what the google.rpc details of an error say. */
  private static void explain(StatusRuntimeException error) throws InvalidProtocolBufferException {
    System.out.printf("error: %s %s%n", error.getStatus().getCode(), error.getStatus().getDescription());
    com.google.rpc.Status status = StatusProto.fromThrowable(error);
    for (var detail : status.getDetailsList()) {
      if (detail.is(ErrorInfo.class)) {
        System.out.println("reason: " + detail.unpack(ErrorInfo.class).getReason());
      } else if (detail.is(BadRequest.class)) {
        for (var wrong : detail.unpack(BadRequest.class).getFieldViolationsList()) {
          System.out.printf("wrong: %s %s%n", wrong.getField(), wrong.getDescription());
        }
      } else if (detail.is(RetryInfo.class)) {
        var delay = detail.unpack(RetryInfo.class).getRetryDelay();
        System.out.printf("try again in: %.3f s%n", delay.getSeconds() + delay.getNanos() / 1e9);
      }
    }
  }
}
